"""The owner's end of the page channel: serves page descriptors to clients, asks for them back, sees clients die."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from kvpool.errors import (
    ConfigError,
    InvalidRequestError,
    LeaseRevokedError,
    PoolBusyError,
    ProtocolError,
    StaleCacheError,
)
from kvpool.memory import channel, socket_path
from kvpool.memory.page_connection import PageConnection

MAX_CLIENTS = 1024

_HELLO_TIMEOUT_S = 30.0
_RETRY_S = 0.05

_log = logging.getLogger(__name__)


class PageSource(Protocol):
    """What a page server serves from: the owner's page table."""

    def export(self, client_id: str, tenant: str, index: int, serial: int) -> int:
        """Return a new descriptor of the page ``serial`` at ``index``; the client counts as mapping it from now on.

        May be called again for the same page when a message could not be sent. Raises :class:`KvpoolError` when that
        page is not, or no longer, there for this tenant; the error reaches the client.
        """
        ...

    def dropped(self, client_id: str, serials: list[int]) -> None:
        """Take note that a client no longer maps these pages (it may name pages that it never mapped)."""
        ...


class _Client:
    """One client process, from its first hello to its death or goodbye."""

    def __init__(self, client_id: str, tenant: str, peer: channel.Peer) -> None:
        self.id = client_id
        self.tenant = tenant
        self.peer = peer
        self.connection: PageConnection | None = None
        self.pending_drops: dict[int, None] = {}  # asked for, not acknowledged; in order
        self.revoked = False


class PageServer:
    """Serves the pages of ``source`` on a Unix socket, within the running event loop.

    Nothing here blocks: a slow or stopped client has its own bounded state and holds up nobody else. All callbacks
    run in the event loop.

    Parameters
    ----------
    path
        The socket: made with mode 0600, in a folder of mode 0700 that is made when missing.
    source
        Where pages come from.
    authorize
        ``(client_id, token) → tenant``; raises :class:`KvpoolError` to refuse (and compares in constant time).
    on_gone
        Called exactly once for each client that got in: its process died, or said goodbye with nothing mapped. A
        closed socket alone is neither: the client may come back, and a forked child may hold the socket open.
    on_connected
        Called at each hello that was let in, also when a client comes back.
    """

    def __init__(
        self,
        path: Path,
        source: PageSource,
        authorize: Callable[[str, str], str],
        on_gone: Callable[[str], None],
        on_connected: Callable[[str], None] | None = None,
    ) -> None:
        socket_path.check_length(path)
        self.path = path
        self.instance = secrets.token_hex(8)
        self._source = source
        self._authorize = authorize
        self._on_gone = on_gone
        self._on_connected = on_connected
        self._clients: dict[str, _Client] = {}
        self._strangers: dict[PageConnection, asyncio.TimerHandle] = {}  # no hello yet; closed when it takes too long
        self._listener: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop

    async def start(self) -> None:
        """Listen.

        Raises
        ------
        ConfigError
            If the folder is open to others, or another server listens there.
        """
        self._loop = asyncio.get_running_loop()
        socket_path.prepare_folder(self.path.parent)
        socket_path.clear(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            listener.bind(str(self.path))
            self.path.chmod(0o600)
            listener.listen(128)
        except OSError as failure:
            listener.close()
            raise ConfigError(f"cannot listen at {self.path}: {failure.strerror}") from failure
        self._listener = listener
        self._loop.add_reader(listener.fileno(), self._accept)

    async def close(self) -> None:
        """Stop serving: remove the socket, close all connections and pidfds. Calls no ``on_gone``. Idempotent."""
        if self._listener is None:
            return
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        self._listener = None
        self.path.unlink(missing_ok=True)
        for connection in list(self._strangers):
            connection.close()
        for client in list(self._clients.values()):
            self._forget(client)

    def clients(self) -> dict[str, int]:
        """Return the living clients and their process ids."""
        return {client.id: client.peer.pid for client in self._clients.values()}

    def request_drop(self, client_id: str, serials: Iterable[int]) -> None:
        """Ask a client to unmap pages; ``source.dropped`` or ``on_gone`` tells when it has.

        Until then it gets none of them again. A client that has lost its connection is asked when it comes back.

        Raises
        ------
        InvalidRequestError
            If no such client lives.
        """
        client = self._clients.get(client_id)
        if client is None:
            raise InvalidRequestError(f"no living client {client_id!r} to ask for its pages", client=client_id)
        new = [serial for serial in dict.fromkeys(serials) if serial not in client.pending_drops]
        client.pending_drops.update(dict.fromkeys(new))
        if client.connection is not None:
            client.connection.ask_back(new)

    def revoke(self, client_id: str) -> None:
        """Hand no more pages to a client, and tell it, now or when it comes back. It need not live."""
        client = self._clients.get(client_id)
        if client is None or client.revoked:
            return
        client.revoked = True
        if client.connection is not None:
            client.connection.reply(channel.encode("revoked"))

    def _listen_again(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as failure:
            # No descriptors left, say: the listener stays readable, so look away for a moment instead of spinning.
            _log.warning("cannot accept a client at %s: %s", self.path, failure)
            self._loop.remove_reader(self._listener.fileno())
            self._loop.call_later(_RETRY_S, self._listen_again)
            return
        accepted.setblocking(False)
        try:
            peer = channel.peer(accepted)
        except ProtocolError as failure:
            _log.warning("refused a client at %s: %s", self.path, failure)
            with contextlib.suppress(OSError):  # it is gone, perhaps: that is one reason for which it is refused
                accepted.send(channel.encode("error", error=failure.to_wire()))
            accepted.close()
            return
        connection = PageConnection(self._loop, accepted, peer, self._handle, self._closed)
        self._strangers[connection] = self._loop.call_later(_HELLO_TIMEOUT_S, connection.close)
        if peer.uid != os.geteuid():
            connection.refuse(ProtocolError(f"user {peer.uid} may not connect to the pages of user {os.geteuid()}"))
        elif len(self._clients) + len(self._strangers) > MAX_CLIENTS:
            connection.refuse(PoolBusyError(f"{MAX_CLIENTS} clients are connected already: use another device"))
        else:
            fields = {"version": channel.VERSION, "instance": self.instance, "nonce": connection.nonce}
            connection.reply(channel.encode("greeting", **fields))

    def _handle(self, connection: PageConnection, message: channel.Message) -> None:
        kind = message["kind"]
        client = self._clients.get(connection.client_id) if connection.client_id is not None else None
        if client is None:
            self._hello(connection, message)
        elif kind == "map":
            connection.request(channel.integer(message, "request"), channel.pages(message))
        elif kind == "ack":
            connection.acknowledge(channel.integer(message, "request"))
        elif kind == "dropped":
            serials = channel.serials(message)
            for serial in serials:
                client.pending_drops.pop(serial, None)
            self._source.dropped(client.id, serials)
        elif kind == "bye":
            self._gone(client)
        else:
            raise ProtocolError(f"a {kind!r} message came out of turn")

    def _hello(self, connection: PageConnection, message: channel.Message) -> None:
        if message["kind"] != "hello" or channel.integer(message, "version") != channel.VERSION:
            raise ProtocolError(
                f"this owner speaks version {channel.VERSION} of the page channel, and hello comes first: "
                f"got {message['kind']!r}, version {message.get('version')!r}; install the same kvpool on both sides",
                version=channel.VERSION,
            )
        if channel.text(message, "nonce") != connection.nonce:
            raise ProtocolError("a hello must return the nonce of the greeting")
        client_id = channel.text(message, "client")
        tenant = self._authorize(client_id, channel.text(message, "token"))
        client = self._clients.get(client_id)
        if client is None:
            client = self._clients[client_id] = _Client(client_id, tenant, connection.peer)
            self._loop.add_reader(client.peer.pidfd, self._gone, client)
        elif client.peer.pid != connection.peer.pid or client.tenant != tenant:
            # The first process still lives (or its pidfd would have told), so its pid is not reused.
            raise ProtocolError(f"client {client_id!r} is process {client.peer.pid}, not {connection.peer.pid}")
        else:
            os.close(connection.peer.pidfd)
            if client.connection is not None:
                client.connection.close()
        client.connection = connection
        connection.serve(client_id, functools.partial(self._export, client))
        self._strangers.pop(connection).cancel()
        connection.reply(channel.encode("welcome", tenant=tenant))
        if client.revoked:
            connection.reply(channel.encode("revoked"))
        connection.ask_back(client.pending_drops)
        if self._on_connected is not None:
            self._on_connected(client_id)

    def _export(self, client: _Client, index: int, serial: int) -> int:
        if client.revoked:
            raise LeaseRevokedError(f"the leases of client {client.id!r} were revoked: connect to the pool again")
        # A page asked back is not given again before it is dropped: the acknowledgement would be taken for both.
        if serial in client.pending_drops:
            raise StaleCacheError(f"page {serial} is being taken back", index=index, serial=serial)
        return self._source.export(client.id, client.tenant, index, serial)

    def _closed(self, connection: PageConnection) -> None:
        """Forget a connection. Its client, if any, lives on."""
        timer = self._strangers.pop(connection, None)
        if timer is not None:
            timer.cancel()
            os.close(connection.peer.pidfd)
        client = self._clients.get(connection.client_id) if connection.client_id is not None else None
        if client is not None and client.connection is connection:
            client.connection = None

    def _gone(self, client: _Client) -> None:
        """The process died, or said goodbye."""
        self._forget(client)
        self._on_gone(client.id)

    def _forget(self, client: _Client) -> None:
        del self._clients[client.id]
        self._loop.remove_reader(client.peer.pidfd)
        os.close(client.peer.pidfd)
        if client.connection is not None:
            client.connection.close()
