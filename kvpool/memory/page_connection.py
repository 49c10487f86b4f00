"""One client's socket at the owner's end of the page channel: takes its messages, sends what is due, never blocks."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import secrets
import socket
from collections import deque
from collections.abc import Callable, Iterable

from kvpool.errors import KvpoolError, ProtocolError
from kvpool.memory import channel

MAX_QUEUED_REQUESTS = 64

_RETRY_S = 0.05

_log = logging.getLogger(__name__)


class PageConnection:
    """One accepted socket within an event loop.

    What is due (replies, pages to ask back, requests to serve) waits as state and becomes a message only when the
    socket has room, so a slow or stopped client costs bounded memory and no open descriptors, and holds up nobody.

    Parameters
    ----------
    loop
        The event loop; all callbacks run in it.
    accepted
        A non-blocking connected socket, owned from now on.
    peer
        The process at its other end.
    on_message
        Takes each message; a :class:`KvpoolError` that it raises is sent to the client and ends the connection.
    on_closed
        Called once when the connection has ended, by whichever side.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        accepted: socket.socket,
        peer: channel.Peer,
        on_message: Callable[[PageConnection, channel.Message], None],
        on_closed: Callable[[PageConnection], None],
    ) -> None:
        self.peer = peer
        self.nonce = secrets.token_hex(8)
        self.client_id: str | None = None
        self._loop = loop
        self._socket = accepted
        self._on_message = on_message
        self._on_closed = on_closed
        self._export: Callable[[int, int], int] | None = None
        self._replies: deque[bytes] = deque()
        self._drops: deque[int] = deque()
        self._requests: deque[tuple[int, list[tuple[int, int]]]] = deque()
        self._unacknowledged: int | None = None
        self._waits_for_room = False
        self._ends = False  # once the replies are sent
        self._closed = False
        loop.add_reader(accepted.fileno(), self._receive)

    def reply(self, message: bytes) -> None:
        """Send a message before all others."""
        self._replies.append(message)
        self._send()

    def refuse(self, failure: KvpoolError) -> None:
        """Send an error and end the connection, now if it cannot be sent at once."""
        _log.warning("refused process %d: %s", self.peer.pid, failure)
        self._replies.append(channel.encode("error", error=failure.to_wire()))
        self._ends = True
        self._send()
        self.close()

    def serve(self, client_id: str, export: Callable[[int, int], int]) -> None:
        """Let the client in: ``export(index, serial)`` gives the descriptors that it asks for."""
        self.client_id = client_id
        self._export = export

    def ask_back(self, serials: Iterable[int]) -> None:
        """Ask the client to unmap pages."""
        self._drops.extend(serials)
        self._send()

    def request(self, number: int, pages: list[tuple[int, int]]) -> None:
        """Serve a request when its turn has come."""
        if len(self._requests) >= MAX_QUEUED_REQUESTS:
            raise ProtocolError(f"more than {MAX_QUEUED_REQUESTS} requests of one client wait")
        self._requests.append((number, pages))
        self._send()

    def acknowledge(self, number: int) -> None:
        """Go on with the next request: the client has the descriptors of this one."""
        if number != self._unacknowledged:
            raise ProtocolError(f"request {number} was acknowledged, but not served just now")
        self._unacknowledged = None
        self._send()

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._socket.fileno())
        self._loop.remove_writer(self._socket.fileno())
        self._socket.close()
        self._on_closed(self)

    def _receive(self) -> None:
        """Take one message; the loop calls again while there are more, after all others had their turn."""
        try:
            message = channel.recv_message(self._socket)
            if message is None:
                self.close()
            else:
                self._on_message(self, message)
        except BlockingIOError:
            return
        except KvpoolError as failure:
            self.refuse(failure)
        except OSError:
            self.close()
        except BaseException:
            self.close()
            raise

    def _send(self) -> None:
        """Send all that can be sent now."""
        if self._closed:
            return
        waits_for_room = False
        try:
            while self._send_next():
                pass
        except BlockingIOError:
            waits_for_room = True
        except OSError as failure:
            if failure.errno != errno.ETOOMANYREFS:
                self.close()
                return
            # Too many of this user's descriptors are under way to stopped clients: try again.
            self._loop.call_later(_RETRY_S, self._send)
        except BaseException:  # a bug in the page source: let the client know by the end of the connection
            self.close()
            raise
        if waits_for_room and not self._waits_for_room:
            self._loop.add_writer(self._socket.fileno(), self._send)
        elif self._waits_for_room and not waits_for_room:
            self._loop.remove_writer(self._socket.fileno())
        self._waits_for_room = waits_for_room

    def _send_next(self) -> bool:
        """Send one message, if one is due. It is forgotten only once it is sent."""
        if self._replies:
            self._socket.send(self._replies[0])
            self._replies.popleft()
        elif self._ends:
            return False
        elif self._drops:
            serials = list(itertools.islice(self._drops, channel.MAX_SERIALS))
            self._socket.send(channel.encode("drop", serials=serials))
            for _ in serials:
                self._drops.popleft()
        elif self._requests and self._unacknowledged is None and self._export is not None:
            number, pages = self._requests[0]
            self._send_pages(self._export, number, pages)
            self._requests.popleft()
            self._unacknowledged = number
        else:
            return False
        return True

    def _send_pages(self, export: Callable[[int, int], int], number: int, pages: list[tuple[int, int]]) -> None:
        """Export pages and send them: all, or those before the first that cannot be had, with the error."""
        descriptors: list[int] = []
        error = None
        try:
            try:
                for index, serial in pages:
                    descriptors.append(export(index, serial))
            except KvpoolError as failure:
                error = failure.to_wire()
            message = channel.encode("pages", request=number, descriptors=len(descriptors), error=error)
            channel.send_pages(self._socket, message, descriptors)
        finally:
            channel.close_all(descriptors)
