"""What a client's container must share with its device's: tried with namespaces of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def namespaces(*flags: str, script: str = "true") -> tuple[str, ...]:
    """Return what runs a command in new namespaces after a script, or skip where that is not allowed."""
    wrapper = ("unshare", *flags, "sh", "-c", f'{script} && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("namespaces of one's own are not allowed here")
    return wrapper


@pytest.mark.parametrize(
    ("flags", "script"),
    [
        (("-n",), "true"),  # no network at all: the socket is a path
        (("-i",), "true"),  # IPC: neither System V nor POSIX shared memory is used
        (("-m",), "mount -t tmpfs none /dev/shm"),  # pages are passed as descriptors, not by name
        (("-u",), "hostname elsewhere"),
        (("-p", "--fork", "--kill-child"), "true"),  # below the owner's PID namespace, who sees it
    ],
    ids=["network", "ipc", "shm", "hostname", "pid"],
)
async def test_what_need_not_be_shared(owner, start_client, flags, script):
    page = owner.add(0, b"hello")
    client = await start_client("a", wrapper=namespaces(*flags, script=script))
    await client.ask("ensure", [page])
    assert await client.ask("read", 0, 5) == "hello"
    client.process.kill()
    await owner.until(lambda: owner.gone == ["a"])  # its death is seen


async def test_the_socket_folder_must_be_shared(owner, start_client):
    folder = Path(owner.path).parent
    with pytest.raises(RuntimeError, match=r"no owner serves pages at .*: No such file or directory"):
        await start_client("a", wrapper=namespaces("-m", script=f"mount -t tmpfs none {folder}"))
    assert owner.connected == []


async def test_the_user_must_be_the_same(owner, start_client):
    if os.geteuid():
        pytest.skip("only root becomes another user")
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv")
    with pytest.raises(RuntimeError, match=r"no owner serves pages at .*: Permission denied"):
        await start_client("a", wrapper=("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"))
    assert owner.connected == []
