"""``kvpool doctor`` in a process whose system is really at fault: its limits, folders, mounts, files."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvpool.doctor.facts import find_token, gather
from kvpool.memory import limits
from kvpool.memory.cuda import Driver, probe_driver
from kvpool.sizes import GIB, MIB

Doctor = Callable[..., dict[str, dict[str, Any]]]

COMMAND = "from kvpool.cli import main; main(['doctor', '--here', '--json', '-', *sys.argv[1:]])"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a token."""
    folder = tmp_path / "home"
    (folder / ".ray").mkdir(parents=True)
    token = folder / ".ray" / "auth_token"
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    return folder


@pytest.fixture
def doctor(home: Path, tmp_path: Path) -> Doctor:
    """Call the command in a process of its own; returns its rows by check, and holds the exit status to them."""

    def call(*arguments: object, before: str = "", wrapper: tuple[str, ...] = (), **environment: object) -> Any:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("KVPOOL_", "RAY_"))}
        done = subprocess.run(
            [*wrapper, sys.executable, "-c", f"import sys\n{before}\n{COMMAND}", *map(str, arguments)],
            capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path,
            env={**kept, "HOME": str(home), **{name: str(value) for name, value in environment.items()}},
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        rows = json.loads(done.stdout)["rows"]
        assert done.returncode == any(row["result"] == "failed" for row in rows)
        assert all(row["mend"] for row in rows if row["result"] != "ok")
        return {row["check"]: row for row in rows}

    return call


def failed(rows: dict[str, dict[str, Any]]) -> list[str]:
    return [check for check, row in rows.items() if row["result"] == "failed"]


def test_all_checks_are_made(doctor: Doctor) -> None:
    rows = doctor("--devices", "host:1x16MiB")
    for check in ("nofile", "max_map_count", "memory", "sockets", "pages", "peer", "driver", "token", "versions"):
        assert rows[check]["result"] == "ok", rows[check]
    assert set(rows) == {"cluster", "shm", "torch", "nofile", "max_map_count", "memory", "sockets", "pages", "peer",
                         "driver", "token", "versions", "niceness", "huge_pages"}  # fmt: skip


# -- limits -----------------------------------------------------------------------------------------------------------

LOW = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))"
DEVICES = ("--devices", "host:1x40MiB")


def test_too_few_open_files(doctor: Doctor) -> None:
    rows = doctor(*DEVICES, before=LOW, KVPOOL_PAGE_SIZE="64KiB")  # 640 pages
    assert failed(rows) == ["nofile"]
    assert "ulimit -n" in rows["nofile"]["mend"]
    assert not failed(doctor(*DEVICES, before=LOW, KVPOOL_PAGE_SIZE="1MiB"))


def test_a_soft_limit_that_may_be_raised_is_no_fault(doctor: Doctor) -> None:
    soft = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 2000))"
    assert not failed(doctor(*DEVICES, before=soft, KVPOOL_PAGE_SIZE="64KiB"))


def test_the_start_of_a_device_and_the_doctor_agree_to_the_last_page() -> None:
    program = """
import resource
from kvpool.config import load_config
from kvpool.doctor.checks import check_nofile
from kvpool.doctor.facts import gather
from kvpool.doctor.plan import plan_host
from kvpool.errors import SystemLimitError
from kvpool.memory.host import HostBackend

resource.setrlimit(resource.RLIMIT_NOFILE, (800, 800))
for pages in range(520, 550):
    plan = plan_host(load_config(devices=f"host:1x{pages * 64}KiB", page_size="64KiB"), 4096)
    try:
        HostBackend().probe(pages=pages, mapped_pages=pages, page_size_bytes=65536)
        outcome = "starts"
    except SystemLimitError:
        outcome = "refused"
    print(outcome, check_nofile(gather([]), plan, "here").result)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True)
    assert set(done.stdout.splitlines()) == {"starts ok", "refused failed"}


def test_too_few_mappings(doctor: Doctor) -> None:
    limit = limits.mapping_limits().limit
    rows = doctor("--devices", f"host:2x{limit // 4 * 4}KiB", KVPOOL_PAGE_SIZE="4KiB")
    assert "max_map_count" in failed(rows)
    assert "sysctl -w vm.max_map_count=" in rows["max_map_count"]["mend"]


def test_more_memory_than_there_is(doctor: Doctor) -> None:
    rows = doctor("--devices", "host:4x1TiB", KVPOOL_PAGE_SIZE="16GiB")
    assert failed(rows) == ["memory"]
    assert "4 TiB for 4 devices" in rows["memory"]["needed"]


@pytest.mark.parametrize(
    ("group", "mount", "files"),
    [
        ("0::/pod", "30 20 0:1 / {root} rw - cgroup2 none rw", ("memory.max", "memory.current")),
        (
            "4:memory:/pod",
            "30 20 0:1 / {root} rw - cgroup none rw,memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ),
    ],
    ids=["v2", "v1"],
)
def test_the_control_groups_limit_counts(tmp_path: Path, group: str, mount: str, files: tuple[str, str]) -> None:
    proc, root = tmp_path / "proc", tmp_path / "group"
    (proc / "self").mkdir(parents=True)
    (root / "pod").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {60 * GIB // 1024} kB\n")
    (proc / "self" / "cgroup").write_text(group + "\n")
    (proc / "self" / "mountinfo").write_text(mount.format(root=root) + "\n")
    for name, size_bytes in zip(files, (3 * GIB, 1 * GIB), strict=True):
        (root / "pod" / name).write_text(str(size_bytes))
    assert gather([], proc=proc).memory == (2 * GIB, 3 * GIB)


# -- folders and mounts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["open to others", "a file", "below a file", "too long", "served"])
def test_folders_in_which_devices_cannot_listen(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    folder = tmp_path / "sockets"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with listener:
        match fault:
            case "open to others":
                folder.mkdir(mode=0o777)
                folder.chmod(0o777)
            case "a file":
                folder.write_text("")
            case "below a file":
                folder.write_text("")
                folder = folder / "below"
            case "too long":
                folder = tmp_path / ("long" * 30)
            case "served":
                folder.mkdir(mode=0o700)
                monkeypatch.chdir(tmp_path)  # as the command, so that the path is short
                folder = Path("sockets")
                listener.bind("sockets/0.sock")
                listener.listen()
        before = sorted(tmp_path.rglob("*"))
        rows = doctor("--devices", "host:1x16MiB", KVPOOL_SOCKET_DIR=folder)
        assert failed(rows) == ["sockets"]
        assert str(folder) in rows["sockets"]["found"]
        assert sorted(tmp_path.rglob("*")) == before  # it leaves nothing behind


def test_a_folder_that_is_missing_is_fine_and_not_left_behind(doctor: Doctor, tmp_path: Path) -> None:
    folder = Path(os.path.relpath(tmp_path / "a" / "b", tmp_path))
    assert doctor("--devices", "host:1x16MiB", KVPOOL_SOCKET_DIR=folder)["sockets"]["result"] == "ok"
    assert not (tmp_path / "a").exists()


def test_the_socket_of_a_dead_device_is_a_warning(doctor: Doctor, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    killed = "import socket, sys; socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).bind('0.sock')"
    subprocess.run([sys.executable, "-c", killed], cwd=folder, check=True)
    row = doctor("--devices", "host:1x16MiB", KVPOOL_SOCKET_DIR="s")["sockets"]
    assert (row["result"], row["mend"].endswith("`rm s/0.sock`")) == ("warning", True)
    assert (folder / "0.sock").exists()  # it only looks


def mounts(script: str) -> tuple[str, ...]:
    """Return what runs a command after mounts of its own, or skip where that is not allowed."""
    wrapper = ("unshare", "-m", "sh", "-c", f'{script} && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("mounts of one's own are not allowed here")
    return wrapper


def test_a_small_shm(doctor: Doctor) -> None:
    rows = doctor("--devices", "host:1x16MiB", wrapper=mounts("mount -t tmpfs -o size=64m none /dev/shm"))
    assert failed(rows) == ["shm"]
    assert rows["shm"]["found"] == "64 MiB free"


def test_a_read_only_folder(doctor: Doctor, tmp_path: Path) -> None:
    folder = tmp_path / "ro"
    folder.mkdir(mode=0o700)
    wrapper = mounts(f"mount -t tmpfs -o ro,mode=700 none {folder}")
    rows = doctor("--devices", "host:1x16MiB", wrapper=wrapper, KVPOOL_SOCKET_DIR="ro")
    assert failed(rows) == ["sockets"]


# -- calls that the system refuses ------------------------------------------------------------------------------------

# What a seccomp profile does: the call fails with EPERM, in this process only.
REFUSED = """
import os
def refused(*arguments, **options):
    raise PermissionError(1, "Operation not permitted")
"""


def test_memory_that_cannot_be_shared(doctor: Doctor) -> None:
    rows = doctor("--devices", "host:1x16MiB", before=f"{REFUSED}os.memfd_create = refused")
    assert failed(rows) == ["pages"]


def test_processes_that_cannot_be_watched(doctor: Doctor) -> None:
    unwatched = f"{REFUSED}os.pidfd_open = refused\nfrom kvpool.memory import channel\nchannel._SO_PEERPIDFD = 9999"
    rows = doctor("--devices", "host:1x16MiB", before=unwatched)
    assert failed(rows) == ["sockets", "peer"]
    assert "would not see it die" in rows["sockets"]["found"]


# -- token ------------------------------------------------------------------------------------------------------------


def test_tokens(doctor: Doctor, home: Path, tmp_path: Path) -> None:
    def result(**environment: object) -> str:
        row = doctor("--devices", "host:1x16MiB", **environment)["token"]
        return f"{row['result']}: {row['found']}"

    token = home / ".ray" / "auth_token"
    assert result() == f"ok: {token}"
    assert result(RAY_AUTH_TOKEN="abc").startswith("ok: RAY_AUTH_TOKEN")
    assert result(RAY_AUTH_TOKEN_PATH=tmp_path / "absent").startswith("failed: ")
    assert result(RAY_AUTH_MODE="disabled").startswith("warning: ")
    token.chmod(0o644)
    assert result().startswith("warning: ")
    token.write_text("\n")
    assert result() == f"failed: {token} is empty"
    token.unlink()
    assert result().startswith("failed: none")


def test_the_token_is_the_one_that_ray_finds(home: Path, tmp_path: Path) -> None:
    """Ray's own loader, in a process for each case, finds a token where ``find_token`` says there is one."""
    other = tmp_path / "other"
    other.write_text("fedcba9876543210")
    program = (
        "from ray._raylet import AuthenticationTokenLoader as Loader; "
        "print(Loader.instance().has_token(ignore_auth_mode=True))"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    for environment in (
        {"HOME": str(home)},
        {"HOME": str(tmp_path)},
        {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": "abc"},
        {"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": str(other)},
        {"HOME": str(home), "RAY_AUTH_TOKEN_PATH": str(tmp_path / "absent")},
    ):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=kept | environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        token = find_token(environment, Path(environment["HOME"]))
        assert (done.stdout.strip() == "True") == (token.source is not None), (environment, done)
        if token.error is not None:
            assert done.returncode or "cannot" in done.stderr, "Ray does not go on without it either"


# -- driver -----------------------------------------------------------------------------------------------------------

LIBRARY = """
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuInit(unsigned flags) { return INIT; }
int cuGetErrorString(int code, const char **text) { *text = "it is broken"; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 40; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute != 102 && attribute != 103) return 1;
    *value = attribute == 102 || device == 40;  /* the second GPU cannot share by descriptors */
    return 0;
}
"""


@pytest.mark.parametrize(
    ("init", "driver"),
    [
        (0, Driver("12.4", 2, (), (1,))),
        (100, Driver("12.4")),
        (803, Driver("12.4", error="cuInit: it is broken (error 803)")),
    ],
)
def test_drivers(tmp_path: Path, init: int, driver: Driver) -> None:
    """A library with the driver's functions, loaded as the real one is."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    library = tmp_path / "libcuda.so.1"
    (tmp_path / "cuda.c").write_text(LIBRARY)
    build = ["cc", "-shared", "-fPIC", f"-DINIT={init}", "-o", str(library), str(tmp_path / "cuda.c")]
    subprocess.run(build, check=True, timeout=240)
    assert probe_driver(str(library)) == driver


def test_no_driver_and_a_library_that_is_none(tmp_path: Path) -> None:
    assert probe_driver(str(tmp_path / "libcuda.so.1")).error is not None
    assert "cuDriverGetVersion" in (probe_driver("libc.so.6").error or "")


def test_what_shared_memory_is_made_of_is_read(tmp_path: Path) -> None:
    setting = tmp_path / "shmem_enabled"
    assert gather([], huge_pages=setting).huge_pages is None, "an old kernel has none"
    setting.write_text("always within_size [advise] never deny force\n")
    assert gather([], huge_pages=setting).huge_pages == "advise"
    setting.write_bytes(b"\xff")
    assert gather([], huge_pages=setting).huge_pages is None


def test_a_missing_shm(tmp_path: Path) -> None:
    assert gather([], shm=tmp_path / "absent").shm is None
    assert (gather([], shm=tmp_path).shm or (0, 0))[1] > MIB
