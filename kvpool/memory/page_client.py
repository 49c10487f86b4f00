"""The client's end of the page channel: one connection to an owner, and the thread that reads it."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from pathlib import Path
from typing import Protocol

from kvpool.errors import DeviceLostError, KvpoolError, PoolUnavailableError, ProtocolError
from kvpool.memory import channel
from kvpool.memory.backend import Access, Backend
from kvpool.memory.fork import fork_guard, watch_forks

_HANDSHAKE_TIMEOUT_S = 30.0

_log = logging.getLogger(__name__)


class PageRequest:
    """Pages asked of the owner (index and serial), and the event that tells that they are mapped."""

    def __init__(self, pages: list[tuple[int, int]], access: Access) -> None:
        self.pages = pages
        self.access = access
        self.done = threading.Event()
        self.error: KvpoolError | None = None


class PageHandler(Protocol):
    """Carries out what the owner sends. Called by the reading thread only, in the order of the messages."""

    def map_pages(self, request: PageRequest, handles: list[int]) -> list[int]:
        """Map the pages that came (the first of those requested). Returns the serials that this replaced."""
        ...

    def drop_pages(self, serials: list[int]) -> None:
        """Unmap these pages wherever they are mapped."""
        ...

    def revoked(self) -> None:
        """Take note that the owner ended this client's leases. It is asked to drop nothing from now on."""
        ...


class PageClient:
    """A connection to an owner. When it is lost, :attr:`live` turns false and every waiting request fails.

    Parameters
    ----------
    path
        The owner's socket.
    client_id, token
        What the owner's ``authorize`` is asked.
    backend
        Takes the descriptors that come.
    page_size_bytes
        Size of a page.
    handler
        Carries out what the owner sends.

    Raises
    ------
    DeviceLostError
        If nobody serves there.
    ProtocolError
        If the owner speaks another version; or whatever error it refuses with.
    """

    def __init__(
        self, path: Path, client_id: str, token: str, backend: Backend, page_size_bytes: int, handler: PageHandler
    ) -> None:
        self.live = True
        self.instance = ""
        self._path = path
        self._backend = backend
        self._page_size_bytes = page_size_bytes
        self._handler = handler
        self._requests: dict[int, PageRequest] = {}
        self._requests_lock = threading.Lock()
        self._next_request = 1
        self._stopping = False
        self._revoked = False
        with fork_guard:  # both descriptors exist for a child's hook before any other thread can fork
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            watch_forks(self)
        try:
            self._shake_hands(client_id, token)
        except BaseException:
            self._close_descriptors()
            raise
        self._thread = threading.Thread(target=self._read, name=f"kvpool-pages-{client_id}", daemon=True)
        self._thread.start()

    def request(self, request: PageRequest, timeout_s: float) -> None:
        """Ask for pages and wait until they are mapped.

        Raises
        ------
        DeviceLostError
            If the connection is lost meanwhile.
        PoolUnavailableError
            If the owner does not answer in time; pages that come later are still mapped.
        KvpoolError
            What the owner refused with, or what failed when mapping. Pages before the refused one are mapped.
        """
        deadline = time.monotonic() + timeout_s
        with self._requests_lock:
            if not self.live:
                raise self._lost()
            number = self._next_request
            self._next_request += 1
            self._requests[number] = request
        self._send("map", request=number, pages=request.pages)
        if not request.done.wait(max(0.0, deadline - time.monotonic())):
            raise PoolUnavailableError(
                f"the owner at {self._path} did not hand out {len(request.pages)} pages within {timeout_s:g} s: "
                "it is stopped, stuck or overloaded",
                pages=len(request.pages),
                timeout_s=timeout_s,
            )
        if request.error is not None:
            raise request.error

    def stop(self, timeout_s: float) -> None:
        """Stop the reading thread; nothing is mapped or unmapped by it afterwards. The connection stays open."""
        self._stopping = True
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)
        self._thread.join(timeout_s)
        if self._thread.is_alive():  # it is stuck in sending to an owner that does not read
            self._socket.shutdown(socket.SHUT_RDWR)
            self._thread.join()

    def say_goodbye(self, timeout_s: float) -> None:
        """Tell the owner that nothing is mapped any more, wait until it has taken note, and close. After :meth:`stop`.

        If the owner cannot be told, it sees by the pidfd when this process ends.
        """
        deadline = time.monotonic() + timeout_s
        try:
            if not self.live:
                return
            self._socket.settimeout(timeout_s)
            self._socket.send(channel.encode("bye"))
            poller = select.poll()
            poller.register(self._socket.fileno(), select.POLLIN)
            ended = False
            while not ended and poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                with fork_guard:
                    message, descriptors = channel.recv_pages(self._socket)
                    channel.close_all(descriptors)
                ended = message is None
        except (OSError, ProtocolError) as failure:
            _log.info("could not say goodbye to the owner at %s: %s", self._path, failure)
        finally:
            self.close()

    def close(self) -> None:
        """Close the socket, after :meth:`stop`. The owner takes this for a lost connection. Idempotent."""
        self.live = False
        self._close_descriptors()

    def after_fork_in_child(self) -> None:
        """Close the inherited socket in a forked child: it belongs to the parent. No shutdown, which would end both."""
        self.live = False
        self._close_descriptors()

    def _shake_hands(self, client_id: str, token: str) -> None:
        self._socket.settimeout(_HANDSHAKE_TIMEOUT_S)
        try:
            self._socket.connect(str(self._path))
            greeting = self._expect("greeting")
            if channel.integer(greeting, "version") != channel.VERSION:
                raise ProtocolError(
                    f"the owner at {self._path} speaks version {greeting['version']} of the page channel, this process "
                    f"{channel.VERSION}: install the same kvpool on both sides"
                )
            self.instance = channel.text(greeting, "instance")
            hello = {"version": channel.VERSION, "nonce": channel.text(greeting, "nonce")}
            self._socket.send(channel.encode("hello", client=client_id, token=token, **hello))
            self._expect("welcome")
        except TimeoutError as failure:
            raise PoolUnavailableError(
                f"the owner at {self._path} did not answer within {_HANDSHAKE_TIMEOUT_S:g} s"
            ) from failure
        except KvpoolError:
            raise
        except OSError as failure:
            raise DeviceLostError(f"no owner serves pages at {self._path}: {failure.strerror}") from failure

    def _expect(self, kind: str) -> channel.Message:
        message = channel.recv_message(self._socket)
        if message is None:
            raise DeviceLostError(f"the owner at {self._path} closed the connection")
        failure = channel.error(message)
        if failure is not None:
            raise failure
        if message["kind"] != kind:
            raise ProtocolError(f"expected {kind!r} from the owner at {self._path}, got {message['kind']!r}")
        return message

    def _read(self) -> None:
        """Take messages until the connection ends or :meth:`stop` is called. Runs in the reading thread."""
        failure: KvpoolError | None = None
        try:
            poller = select.poll()
            poller.register(self._socket.fileno(), select.POLLIN)
            poller.register(self._wake, select.POLLIN)
            while True:
                poller.poll()
                if self._stopping:
                    return
                if not self._take():
                    break
        except KvpoolError as error:
            failure = error
        except OSError as error:
            failure = DeviceLostError(f"lost the connection to the owner at {self._path}: {error.strerror}")
        finally:
            with self._requests_lock:
                self.live = self.live and self._stopping
                waiting = list(self._requests.values())
                self._requests.clear()
            for request in waiting:
                request.error = failure or self._lost()
                request.done.set()

    def _take(self) -> bool:
        """Take and carry out one message. Returns whether there may be more."""
        with fork_guard:  # from here until the backend knows them, a fork would copy the descriptors
            message, descriptors = channel.recv_pages(self._socket)
            handles, failure = self._import(descriptors)
        if message is None:
            return False
        if message["kind"] == "pages":
            self._map(message, handles, failure)
        elif message["kind"] == "revoked":
            self._revoked = True
            self._handler.revoked()
        elif message["kind"] == "drop" and self._revoked:
            pass  # tensors may still lie in these pages: all go together, with the goodbye
        elif message["kind"] == "drop":
            serials = channel.serials(message)
            self._handler.drop_pages(serials)
            self._send("dropped", serials=serials)  # unknown ones too: they are not mapped any more
        else:
            raise channel.error(message) or ProtocolError(f"the owner sent {message['kind']!r} out of turn")
        return True

    def _import(self, descriptors: list[int]) -> tuple[list[int], KvpoolError | None]:
        handles: list[int] = []
        for position, descriptor in enumerate(descriptors):
            try:
                handles.append(self._backend.import_(descriptor, self._page_size_bytes))
            except KvpoolError as failure:
                channel.close_all(descriptors[position + 1 :])
                return handles, failure
        return handles, None

    def _map(self, message: channel.Message, handles: list[int], failure: KvpoolError | None) -> None:
        number = channel.integer(message, "request")
        with self._requests_lock:
            request = self._requests.get(number)
        try:
            if request is None:
                raise ProtocolError(f"the owner answered request {number}, which nobody waits for")
            failure = failure or channel.error(message)
            try:
                replaced = self._handler.map_pages(request, handles)
            except KvpoolError as error:
                failure, replaced = error, []
        finally:
            for handle in handles:
                self._backend.release(handle)
        # Told before the acknowledgement: only after that can the owner hand out one of these pages again.
        for start in range(0, len(replaced), channel.MAX_SERIALS):
            self._send("dropped", serials=replaced[start : start + channel.MAX_SERIALS])
        self._send("ack", request=number)
        with (
            self._requests_lock
        ):  # only now: whatever went wrong before, the waiting thread is told at the end of _read
            del self._requests[number]
        request.error = failure
        request.done.set()

    def _send(self, kind: str, **fields: object) -> None:
        try:
            self._socket.send(channel.encode(kind, **fields))
        except OSError as failure:
            if isinstance(failure, KvpoolError):
                raise
            raise self._lost() from failure

    def _lost(self) -> DeviceLostError:
        return DeviceLostError(f"lost the connection to the owner at {self._path}: open the cache again")

    def _close_descriptors(self) -> None:
        with fork_guard:
            self._socket.close()
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1
