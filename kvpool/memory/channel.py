"""The page channel: how an owner hands the descriptors of its pages to client processes on the same host.

A Unix ``SOCK_SEQPACKET`` socket (message borders are kept), one JSON object a message, built-in types only. The owner
speaks first; ``nonce`` comes back in ``hello``, which shows that the process behind the pidfd was still alive when
that was opened, so its pid cannot have been reused:

=========  =========  ==============================================================================================
direction  kind       fields
=========  =========  ==============================================================================================
owner →    greeting   ``version``, ``instance`` (of the server: a restarted owner has another), ``nonce``
→ owner    hello      ``version``, ``nonce``, ``client``, ``token``
owner →    welcome    ``tenant``
→ owner    map        ``request``, ``pages`` (at most 128 pairs of index and serial)
owner →    pages      ``request``, ``descriptors`` (how many come with it: a prefix of ``pages``), ``error`` or null
→ owner    ack        ``request``: received and mapped; only then the next ``pages`` is sent
owner →    drop       ``serials``: unmap these pages everywhere
owner →    revoked    the client's leases have ended by an administrator's word: it gets no more pages, and answers no
                      ``drop``. When nothing that it has mapped is in use any more it unmaps all and says ``bye``
→ owner    dropped    ``serials``: they are unmapped (also sent unasked when a page was replaced)
→ owner    bye        everything is unmapped, the client goes
owner →    error      ``error``: refused; the connection ends
=========  =========  ==============================================================================================

Descriptors in a message: 128 at most (254 fail), and a receive with too little room loses descriptors silently, so they
are counted, and acknowledged before the next.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from kvpool.errors import KvpoolError, ProtocolError, from_wire

VERSION = 2
MAX_DESCRIPTORS = 128
MAX_SERIALS = 1024
MAX_MESSAGE_BYTES = 64 * 1024
MAX_TEXT = 512

_SO_PEERPIDFD = 77  # Linux 6.5
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)

Message = dict[str, Any]


class Peer(NamedTuple):
    """The process at the other end. ``pidfd`` is a descriptor that the caller closes."""

    pid: int
    uid: int
    pidfd: int


def encode(kind: str, **fields: Any) -> bytes:
    """Return one message as bytes."""
    data = json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"a {kind} message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}",
            size_bytes=len(data),
            limit_bytes=MAX_MESSAGE_BYTES,
        )
    return data


def send_pages(channel: socket.socket, message: bytes, descriptors: Sequence[int]) -> None:
    """Send a message and the descriptors that go with it, all or none. The caller closes the descriptors.

    Raises
    ------
    ProtocolError
        For more than 128 descriptors.
    OSError
        As ``sendmsg`` does; nothing was sent.
    """
    if len(descriptors) > MAX_DESCRIPTORS:
        raise ProtocolError(f"{len(descriptors)} descriptors in one message, at most {MAX_DESCRIPTORS} are possible")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    channel.sendmsg([message], ancillary)


def recv_pages(channel: socket.socket) -> tuple[Message | None, list[int]]:
    """Receive one message and the descriptors that came with it, which the caller closes.

    Returns
    -------
    tuple
        ``(None, [])`` at the end of the connection.

    Raises
    ------
    ProtocolError
        If it is cut off, is no message, or its descriptors are not as many as it says. All that came are closed.
    OSError
        As ``recvmsg`` does.
    """
    data, ancillary, flags, _ = channel.recvmsg(MAX_MESSAGE_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
    descriptors: list[int] = []
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received = array.array("i")
            received.frombytes(payload[: len(payload) - len(payload) % received.itemsize])
            descriptors.extend(received)
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ProtocolError(
                f"a message was cut off after {len(data)} bytes and {len(descriptors)} descriptors "
                "(is this process at its limit of open files?)",
                descriptors=len(descriptors),
            )
        message = _decode(data) if data else None
        announced = message.get("descriptors", 0) if message else 0
        if announced != len(descriptors):
            raise ProtocolError(f"a message announced {announced!r} descriptors and carried {len(descriptors)}")
    except ProtocolError:
        close_all(descriptors)
        raise
    return message, descriptors


def recv_message(channel: socket.socket) -> Message | None:
    """Receive one message that may carry no descriptors (the kernel closes any); None at the end of the connection."""
    data, _, flags, _ = channel.recvmsg(MAX_MESSAGE_BYTES)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise ProtocolError(f"a message of over {MAX_MESSAGE_BYTES} bytes, or one with descriptors, came out of turn")
    return _decode(data) if data else None


def close_all(descriptors: Iterable[int]) -> None:
    """Close each of the descriptors."""
    for descriptor in descriptors:
        os.close(descriptor)


def integer(message: Message, name: str) -> int:
    """Return a field that must be a non-negative integer."""
    value = message.get(name)
    if type(value) is not int or value < 0:
        raise _unreadable(message, name)
    return value


def text(message: Message, name: str) -> str:
    """Return a field that must be a short text."""
    value = message.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT:
        raise _unreadable(message, name)
    return value


def serials(message: Message) -> list[int]:
    """Return the serials of a ``drop`` or ``dropped`` message."""
    values = message.get("serials")
    if not isinstance(values, list) or not 0 < len(values) <= MAX_SERIALS:
        raise _unreadable(message, "serials")
    if any(type(value) is not int for value in values):
        raise _unreadable(message, "serials")
    return values


def pages(message: Message) -> list[tuple[int, int]]:
    """Return the ``(index, serial)`` pairs of a ``map`` message."""
    values = message.get("pages")
    if not isinstance(values, list) or not 0 < len(values) <= MAX_DESCRIPTORS:
        raise _unreadable(message, "pages")
    for pair in values:
        if not isinstance(pair, list) or len(pair) != 2 or any(type(value) is not int for value in pair):
            raise _unreadable(message, "pages")
    return [(index, serial) for index, serial in values]


def error(message: Message) -> KvpoolError | None:
    """Return the error that a message carries, if any."""
    wire = message.get("error")
    if wire is None:
        return None
    if not isinstance(wire, list) or len(wire) != 3 or not isinstance(wire[0], str) or not isinstance(wire[2], dict):
        raise _unreadable(message, "error")
    return from_wire((wire[0], str(wire[1]), wire[2]))


def peer(channel: socket.socket) -> Peer:
    """Return the process at the other end of a connected socket (for an accepted one: that which connected).

    Raises
    ------
    ProtocolError
        If it is gone, or lives in a process namespace that cannot be seen from here.
    """
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    try:
        pidfd = channel.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        # An older kernel. The nonce makes this safe: only a process alive after this line can send it back.
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as failure:
            raise ProtocolError(
                f"the owner cannot watch the client process {pid} and would not see it die: {failure.strerror}. Run "
                "both in one PID namespace (hostPID, shareProcessNamespace), or on Linux 6.5 or newer",
                pid=pid,
            ) from failure
    return Peer(pid, uid, pidfd)


def _decode(data: bytes) -> Message:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as failure:
        raise ProtocolError(f"a message of {len(data)} bytes is not JSON") from failure
    if not isinstance(message, dict) or not isinstance(message.get("kind"), str):
        raise ProtocolError("a message is no object with a kind")
    return message


def _unreadable(message: Message, name: str) -> ProtocolError:
    return ProtocolError(f"{name!r} of a {message['kind']!r} message is missing, too long or of the wrong type")
