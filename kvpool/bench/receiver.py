"""A receiver of OTLP over HTTP for benchmarks: takes all that comes, decodes nothing, says what it cost.

Run as a program it prints its port, and what ``GET`` answers is JSON: requests and bytes taken, CPU seconds used.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Takes what is posted, and tells how much that was."""

    protocol_version = "HTTP/1.1"  # exporters keep their connection
    requests = 0
    taken_bytes = 0

    def do_POST(self) -> None:
        """Take a request of an exporter."""
        length = int(self.headers.get("Content-Length", 0))
        self.rfile.read(length)
        Handler.requests += 1
        Handler.taken_bytes += length
        self._answer(b"")

    def do_GET(self) -> None:
        """Tell what was taken so far."""
        said = {"requests": Handler.requests, "taken_bytes": Handler.taken_bytes, "cpu_s": time.process_time()}
        self._answer(json.dumps(said).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""


def main() -> None:
    """Serve until standard input ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
