"""A server that speaks the S3 protocol (moto's), and a proxy before it that does what networks do."""

from __future__ import annotations

import functools
import http.client
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

Fault = str  # "drop", "cut", "short", "stall", or a status such as "503"
FAULTS = ("drop", "cut", "short", "500", "503")


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server with an empty bucket `bucket`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        connection = http.client.HTTPConnection(host, port)
        connection.request("PUT", "/bucket")
        assert connection.getresponse().status == 200
        connection.close()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@contextmanager
def web_server(folder: Path) -> Iterator[FaultProxy]:
    """A plain web server of a folder, with listings, behind a proxy."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    proxy = FaultProxy(f"http://127.0.0.1:{server.server_port}")
    try:
        yield proxy
    finally:
        proxy.close()
        server.shutdown()
        server.server_close()


class FaultProxy:
    """Passes requests on to an HTTP server, but for those that `faults` says something about.

    `faults(method, path, count)` gets each request, with the number of requests seen before it, and returns None or one of: "drop",
    which closes the connection with no answer; "cut", which closes it within the body; "short", a whole and consistent answer of half
    the body; "stall", silence of `stall_s`; a status such as "503". `condition(method, path, body)` says the same of requests that the
    server itself ought to refuse. `seen` lists (method, path, range header) of all requests.
    """

    def __init__(self, target: str):
        self.faults: Callable[[str, str, int], Fault | None] = lambda method, path, count: None
        self.condition: Callable[[str, str, bytes], Fault | None] = lambda method, path, body: None
        self.stall_s = 1.0
        self.seen: list[tuple[str, str, str]] = []
        self.num_faults = 0
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        host = urlsplit(target).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and body are two writes: the second would wait for 40 ms

            def do_GET(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size)
                with proxy._lock:
                    count = len(proxy.seen)
                    proxy.seen.append((self.command, self.path, self.headers.get("Range", "")))
                    fault = proxy.faults(self.command, self.path, count)
                    proxy.num_faults += fault is not None
                self._answer(body, fault or proxy.condition(self.command, self.path, body))

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def _answer(self, body: bytes, fault: Fault | None) -> None:
                if fault == "stall":
                    time.sleep(proxy.stall_s)
                if fault == "drop":
                    return self._hang_up()
                if fault and fault.isdigit():
                    self.send_response(int(fault))
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                connection = http.client.HTTPConnection(host)
                connection.request(self.command, self.path, body, dict(self.headers.items()))
                answer = connection.getresponse()
                data = answer.read()
                connection.close()
                sent = data[: len(data) // 2] if fault in ("cut", "short") else data
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    # A short answer is consistent in itself: only its length gives it away.
                    told = name.lower()
                    if told not in ("transfer-encoding", "connection", "content-length") and not (
                        fault == "short" and told.startswith(("x-amz-checksum", "content-range"))
                    ):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") or "0"
                if self.command != "HEAD":
                    length = str(len(sent if fault == "short" else data))
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(sent)
                if fault == "cut":
                    self._hang_up()

            def _hang_up(self) -> None:
                self.wfile.flush()
                self.close_connection = True
                # A reset, not a polite end.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        """Ends the proxy's thread."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def requests(self, method: str, part: str) -> int:
        """How many requests of a method had `part` in their path."""
        return sum(m == method and part in path for m, path, _ in self.seen)
