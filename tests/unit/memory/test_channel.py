"""The page channel's messages, and what a server makes of clients that do not keep to them."""

from __future__ import annotations

import array
import asyncio
import json
import os
import resource
import socket
import stat
from collections.abc import Iterator
from typing import Any

import pytest

from kvpool.errors import ConfigError, ProtocolError, StaleCacheError, UnknownCacheError
from kvpool.memory import channel
from kvpool.memory.page_server import PageServer

TOKEN = "the right token"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    left.settimeout(60)
    right.settimeout(60)
    yield left, right
    left.close()
    right.close()


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_128_descriptors_arrive_in_order(pair) -> None:
    files = [os.memfd_create(str(number)) for number in range(channel.MAX_DESCRIPTORS)]
    before = open_descriptors()
    channel.send_pages(pair[0], channel.encode("pages", request=1, descriptors=len(files)), files)
    message, received = channel.recv_pages(pair[1])
    assert message == {"kind": "pages", "request": 1, "descriptors": 128}
    assert [os.fstat(number).st_ino for number in received] == [os.fstat(number).st_ino for number in files]
    assert not any(os.get_inheritable(number) for number in received)
    channel.close_all(received)
    assert open_descriptors() == before
    channel.close_all(files)


def test_129_descriptors_are_refused_before_sending(pair) -> None:
    with pytest.raises(ProtocolError, match="at most 128"):
        channel.send_pages(pair[0], channel.encode("pages"), [0] * 129)


@pytest.mark.parametrize("announced", [0, 1, 3, "2", None])
def test_wrong_count_of_descriptors_closes_them(pair, announced: object) -> None:
    before = open_descriptors()
    channel.send_pages(pair[0], channel.encode("pages", descriptors=announced), [0, 1])
    with pytest.raises(ProtocolError, match="announced"):
        channel.recv_pages(pair[1])
    assert open_descriptors() == before


def test_descriptors_that_were_cut_off_are_noticed_and_closed(pair) -> None:
    before = open_descriptors()
    files = array.array("i", [0] * 200)
    pair[0].sendmsg([channel.encode("pages", descriptors=200)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    with pytest.raises(ProtocolError, match="cut off"):
        channel.recv_pages(pair[1])
    assert open_descriptors() == before


def test_descriptors_beyond_the_limit_of_open_files_are_noticed_and_closed(pair) -> None:
    files = [0] * 100
    channel.send_pages(pair[0], channel.encode("pages", descriptors=100), files)
    before = open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [number for number in range(1000) if str(number) not in before]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[50], hard))  # room for 50 of them
    try:
        with pytest.raises(ProtocolError, match="limit of open files"):
            channel.recv_pages(pair[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert open_descriptors() == before


@pytest.mark.parametrize("data", [b"{", b"[]", b"{}", b'{"kind": 3}', b"\xff", b"[" * 60000, b"1" * 60000])
def test_what_is_no_message_is_refused(pair, data: bytes) -> None:
    for receive in (channel.recv_pages, channel.recv_message):
        pair[0].send(data)
        with pytest.raises(ProtocolError):
            receive(pair[1])


def test_too_large_a_message_is_refused_on_both_sides(pair) -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        channel.encode("x", text="y" * channel.MAX_MESSAGE_BYTES)
    for receive in (channel.recv_pages, channel.recv_message):
        pair[0].send(b"x" * (channel.MAX_MESSAGE_BYTES + 1))
        with pytest.raises(ProtocolError):
            receive(pair[1])


def test_end_of_the_connection(pair) -> None:
    pair[0].close()
    assert channel.recv_pages(pair[1]) == (None, [])


def test_errors_keep_their_type_and_figures() -> None:
    message = json.loads(channel.encode("pages", error=UnknownCacheError("gone", index=3).to_wire()))
    found = channel.error(message)
    assert type(found) is UnknownCacheError
    assert found.details == {"index": 3}


def test_peer_is_the_connected_process(pair) -> None:
    found = channel.peer(pair[0])
    assert (found.pid, found.uid) == (os.getpid(), os.getuid())
    os.close(found.pidfd)


def test_peer_on_an_older_kernel(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_SO_PEERPIDFD", 9999)
    found = channel.peer(pair[0])
    assert os.readlink(f"/proc/self/fd/{found.pidfd}") == "anon_inode:[pidfd]"
    os.close(found.pidfd)


class Talker:
    """Speaks to a server message by message."""

    def __init__(self, path: Any) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.socket.connect(str(path))

    async def hear(self) -> Any:
        loop = asyncio.get_running_loop()
        heard: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self.socket, lambda: heard.done() or heard.set_result(None))
        try:
            await asyncio.wait_for(heard, 60)
        finally:
            loop.remove_reader(self.socket)
        message, descriptors = channel.recv_pages(self.socket)
        channel.close_all(descriptors)
        return message

    def say(self, kind: str, **fields: Any) -> None:
        self.socket.send(channel.encode(kind, **fields))

    async def hello(self, client: str = "a", **changed: Any) -> Any:
        greeting = await self.hear()
        self.greeting = greeting
        fields = {"version": channel.VERSION, "nonce": greeting["nonce"], "client": client, "token": TOKEN}
        self.say("hello", **{**fields, **changed})
        return await self.hear()


@pytest.fixture
def talk(owner) -> Iterator[Any]:
    talkers = []

    def start() -> Talker:
        talkers.append(Talker(owner.path))
        return talkers[-1]

    yield start
    for talker in talkers:
        talker.socket.close()


async def test_socket_is_for_its_owner_alone(owner) -> None:
    assert stat.S_IMODE(owner.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(owner.path.parent.stat().st_mode) == 0o700


async def test_welcome(owner, talk) -> None:
    talker = talk()
    assert await talker.hello() == {"kind": "welcome", "tenant": "default"}
    assert talker.greeting["version"] == channel.VERSION
    assert owner.server.clients() == {"a": os.getpid()}


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"token": "wrong"}, "InvalidRequestError"),
        ({"version": channel.VERSION + 1}, "ProtocolError"),
        ({"nonce": "an old one"}, "ProtocolError"),
        ({"client": 7}, "ProtocolError"),
        ({"client": "x" * 1000}, "ProtocolError"),
        ({"kind": "map"}, "ProtocolError"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(next(iter(value))),
)
async def test_wrong_hello_is_refused(owner, talk, changed: dict[str, Any], error: str) -> None:
    talker = talk()
    changed = dict(changed)
    greeting = await talker.hear()
    fields = {"version": channel.VERSION, "nonce": greeting["nonce"], "client": "a", "token": TOKEN, **changed}
    talker.say(fields.pop("kind", "hello"), **fields)
    answer = await talker.hear()
    assert answer["error"][0] == error
    assert await talker.hear() is None  # the connection ends
    assert owner.server.clients() == {}
    assert owner.connected == []


async def test_process_of_another_user_is_refused(owner, talk, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = channel.peer
    monkeypatch.setattr(channel, "peer", lambda accepted: peer(accepted)._replace(uid=os.geteuid() + 1))
    answer = await talk().hear()
    assert answer["kind"] == "error"
    assert "may not connect" in answer["error"][1]


async def test_process_that_cannot_be_watched_is_told_so(owner, talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Linux before 6.5, when the client lives in a PID namespace that the owner does not see."""

    def unseen(accepted: socket.socket) -> channel.Peer:
        raise ProtocolError("the owner cannot watch the client process 0")

    monkeypatch.setattr(channel, "peer", unseen)
    talker = talk()
    answer = await talker.hear()
    assert answer["kind"] == "error"
    assert "cannot watch" in answer["error"][1]
    assert await talker.hear() is None


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("hello", {}),
        ("nonsense", {}),
        ("ack", {"request": 1}),
        ("map", {"request": 1, "pages": []}),
        ("map", {"request": 1, "pages": [[0, 100]] * 129}),
        ("map", {"request": 1, "pages": [[0, "100"]]}),
        ("map", {"request": 1, "pages": [[0]]}),
        ("map", {"pages": [[0, 100]]}),
        ("dropped", {"serials": "all"}),
        ("dropped", {"serials": list(range(1025))}),
    ],
)
async def test_what_does_not_fit_ends_the_connection_but_not_the_client(owner, talk, kind, fields) -> None:
    talker = talk()
    await talker.hello()
    talker.say(kind, **fields)
    assert (await talker.hear())["error"][0] == "ProtocolError"
    assert await talker.hear() is None
    assert owner.gone == []
    assert (await talk().hello())["kind"] == "welcome"  # it may come back


async def test_descriptors_from_a_client_are_not_taken(owner, talk) -> None:
    talker = talk()
    await talker.hello()
    before = open_descriptors()
    channel.send_pages(talker.socket, channel.encode("bye"), [0, 1, 2])
    assert (await talker.hear())["error"][0] == "ProtocolError"
    assert await talker.hear() is None
    assert len(open_descriptors()) == len(before) - 1  # the server's end


async def test_pages_come_one_message_at_a_time(owner, talk) -> None:
    talker = talk()
    await talker.hello()
    pages = [owner.add(index) for index in range(2)]
    for number in (1, 2):
        talker.say("map", request=number, pages=pages)
    assert (await talker.hear())["request"] == 1
    owner.server.request_drop("a", [77])
    assert await talker.hear() == {"kind": "drop", "serials": [77]}  # but not the second request
    talker.say("ack", request=1)
    assert await talker.hear() == {"kind": "pages", "request": 2, "descriptors": 2, "error": None}


async def test_pages_before_a_missing_one_are_handed_out_with_the_error(owner, talk) -> None:
    talker = talk()
    await talker.hello()
    talker.say("map", request=1, pages=[owner.add(0), (1, 5), owner.add(2)])
    answer = await talker.hear()
    assert answer["descriptors"] == 1
    assert type(channel.error(answer)) is StaleCacheError
    assert owner.holders["a"] == {owner.pages[0][0]}


async def test_page_asked_back_is_given_again_only_after_it_was_dropped(owner, talk) -> None:
    talker = talk()
    await talker.hello()
    page = owner.add(0)
    owner.server.request_drop("a", [page[1]])
    talker.say("map", request=1, pages=[page])
    assert (await talker.hear())["kind"] == "drop"
    assert type(channel.error(await talker.hear())) is StaleCacheError
    talker.say("ack", request=1)
    talker.say("dropped", serials=[page[1]])
    talker.say("map", request=2, pages=[page])
    assert (await talker.hear())["descriptors"] == 1


async def test_bug_in_the_page_source_ends_the_connection(owner, talk, monkeypatch: pytest.MonkeyPatch) -> None:
    talker = talk()
    await talker.hello()
    seen: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context["exception"]))
    monkeypatch.setattr(owner, "export", lambda *_: 1 / 0)
    talker.say("map", request=1, pages=[[0, 1]])
    assert await talker.hear() is None
    assert [type(error) for error in seen] == [ZeroDivisionError]


async def test_client_that_says_goodbye_is_gone_once(owner, talk) -> None:
    talker = talk()
    await talker.hello()
    talker.say("bye")
    assert await talker.hear() is None
    assert owner.gone == ["a"]
    with pytest.raises(ValueError, match="no living client"):
        owner.server.request_drop("a", [1])


async def test_same_client_may_connect_anew_but_keeps_one_connection(owner, talk) -> None:
    first, second = talk(), talk()
    await first.hello()
    owner.server.request_drop("a", [5])
    assert (await first.hear())["serials"] == [5]
    assert (await second.hello())["kind"] == "welcome"
    assert (await second.hear())["serials"] == [5]  # not acknowledged yet
    assert await first.hear() is None
    assert owner.gone == []


async def test_another_process_cannot_take_over_a_client(owner, talk, start_client) -> None:
    client = await start_client("a")
    answer = await talk().hello("a")
    assert f"is process {client.pid}" in answer["error"][1]
    assert await client.ask("ensure", [owner.add(0)]) == 1


async def test_connections_that_say_nothing_are_closed(owner, talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.memory.page_server._HELLO_TIMEOUT_S", 0.05)
    talker = talk()
    assert (await talker.hear())["kind"] == "greeting"
    assert await talker.hear() is None


async def test_too_many_clients_are_refused(owner, talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.memory.page_server.MAX_CLIENTS", 1)
    await talk().hello()
    assert (await talk().hear())["error"][0] == "PoolBusyError"


async def test_socket_left_behind_is_replaced_and_a_living_one_is_not(owner) -> None:
    other = PageServer(owner.path, owner, lambda *_: "", lambda _: None)
    with pytest.raises(ConfigError, match="another server"):
        await other.start()
    left = owner.path.with_name("left")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(left))
    server = PageServer(left, owner, lambda *_: "", lambda _: None)
    await server.start()
    await server.close()
    await server.close()
    assert not left.exists()


async def test_folder_that_others_may_enter_is_refused(owner, tmp_path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="chmod 0700"):
        await PageServer(tmp_path / "s", owner, lambda *_: "", lambda _: None).start()
    with pytest.raises(ConfigError, match="longer than"):
        PageServer(tmp_path / ("s" * 120), owner, lambda *_: "", lambda _: None)


async def test_closing_leaves_no_descriptor(owner, talk) -> None:
    before = open_descriptors()
    server = PageServer(owner.path.with_name("second"), owner, lambda *_: "default", lambda _: None)
    await server.start()
    named, silent = Talker(server.path), Talker(server.path)
    await named.hello()
    await silent.hear()
    await server.close()
    assert not server.path.exists()
    named.socket.close()
    silent.socket.close()
    assert open_descriptors() == before
