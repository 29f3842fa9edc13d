"""A proxy on 127.0.0.1 that damages a share of the requests to an S3 server: 503, a reset, a body cut short, silence.

A GET's answer is cut short, or stops in the middle; a HEAD's has no body, so that it is only refused or reset. Of what changes something,
the request's own body is cut short on its way; a reset comes before the server heard of it or after it did it; silence follows after it.

It forwards the Host header as it came, for AWS signatures cover it: the server sees the proxy's address, which is what the client signed.
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("503", "reset", "short", "stall")
_BUSY = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
_HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding")


class Proxy:
    """`rate` and `faults` may be changed at any time; `seen` counts what was done to the requests."""

    def __init__(self, upstream: str, seed: int, stall_s: float) -> None:
        self.rate = 0.0
        self.faults: tuple[str, ...] = FAULTS
        self.seen: Counter[str] = Counter()
        self.stall_s = stall_s
        self.upstream = urlsplit(upstream).netloc
        self.stopping = threading.Event()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def choice(self) -> tuple[str, float]:
        """What to do to the next request, and a number in [0, 1) that says where a body is cut."""
        with self._lock:
            fault = self._random.choice(self.faults) if self._random.random() < self.rate else "none"
            self.seen[fault] += 1
            return fault, self._random.random()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a client may keep its connection open for as long as it likes
    proxy: Proxy

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of the game: nothing is printed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _forward(self) -> None:
        proxy = self.server.proxy
        fault, where = proxy.choice()
        sent = self._body()
        self.close_connection = fault != "none"
        if fault == "503":
            self._answer(503, "Slow Down", [("Content-Type", "application/xml")], _BUSY, len(_BUSY))
            return
        if self.command in ("GET", "HEAD"):
            if fault == "reset":
                self._reset()
                return
        elif fault != "none":
            if fault == "short":
                self._send_short(sent, where)
            elif fault == "stall" or where < 0.5:  # done, and nobody hears of it
                self._ask(sent)
            if fault == "stall":
                proxy.stopping.wait(proxy.stall_s)
            self._reset()
            return
        answer, body = self._ask(sent)
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in (*_HOP_BY_HOP, "content-length")]
        length = int(answer.getheader("Content-Length") or 0) if self.command == "HEAD" else len(body)
        kept = body if fault == "none" else body[: int(where * len(body))]
        self._answer(answer.status, answer.reason, headers, kept, length)
        if fault == "stall":
            self.wfile.flush()
            proxy.stopping.wait(proxy.stall_s)

    def _body(self) -> bytes:
        """The request's body as it came, the marks of its chunks included: some clients do not know its length beforehand."""
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        read = bytearray()
        while True:
            line = self.rfile.readline()
            size = int(line.split(b";")[0], 16)
            read += line + self.rfile.read(size + 2)  # the last chunk is empty
            if size == 0:
                return bytes(read)

    def _ask(self, sent: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """The server's answer."""
        upstream = http.client.HTTPConnection(self.server.proxy.upstream, timeout=30)
        try:
            self._send_headers(upstream)
            upstream.endheaders(sent or None)
            answer = upstream.getresponse()
            return answer, answer.read()
        finally:
            upstream.close()

    def _send_short(self, sent: bytes, where: float) -> None:
        """The server gets a part of the body that it was promised, and then the end of the connection."""
        if not sent:
            return
        upstream = http.client.HTTPConnection(self.server.proxy.upstream, timeout=30)
        try:
            self._send_headers(upstream)
            upstream.endheaders(sent[: int(where * len(sent))] or None)
        finally:
            upstream.close()

    def _send_headers(self, upstream: http.client.HTTPConnection) -> None:
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() != "expect":  # answered here
                upstream.putheader(name, value)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())  # with no time to linger, this sends a reset

    def _answer(self, status: int, reason: str, headers: list[tuple[str, str]], body: bytes, length: int) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward


@contextmanager
def start_s3_proxy(upstream: str, seed: int = 0, stall_s: float = 3.0) -> Iterator[Proxy]:
    """Yields a proxy in front of the server at `upstream` (http://host:port), without faults until `rate` is set."""
    proxy = Proxy(upstream, seed, stall_s)
    thread = threading.Thread(target=proxy._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stopping.set()
        proxy._server.shutdown()
        with suppress(OSError):
            proxy._server.server_close()
        thread.join()
