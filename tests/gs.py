"""A server that speaks Google Cloud Storage's JSON API (gcp-storage-emulator), with the conditional writes that it lacks."""

from __future__ import annotations

import http.client
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, quote, urlsplit

from tests.s3 import FaultProxy


@contextmanager
def gs_server() -> Iterator[FaultProxy]:
    """A proxy before a server with an empty bucket `bucket`."""
    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    server.start()
    host = "{}:{}".format(*server._api._httpd.server_address[:2])

    def exists(name: str) -> bool:
        connection = http.client.HTTPConnection(host)
        connection.request("GET", f"/storage/v1/b/bucket/o/{quote(name, safe='')}")
        answer = connection.getresponse()
        answer.read()
        connection.close()
        return answer.status == 200

    def condition(method: str, path: str, body: bytes) -> str | None:
        if method != "POST" or parse_qs(urlsplit(path).query).get("ifGenerationMatch") != ["0"]:
            return None
        about = next(line for line in body.splitlines() if line.startswith(b"{"))
        return "412" if exists(json.loads(about)["name"]) else None

    proxy = FaultProxy(f"http://{host}")
    proxy.condition = condition
    try:
        yield proxy
    finally:
        proxy.close()
        server.stop()
