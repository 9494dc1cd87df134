"""An S3 server for tests: moto's, in threads of this process, with its requests counted."""

import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class _Silent(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        """Nothing."""


class S3Server:
    """`requests` has (method, path) of every request in their order. While `away`, each is answered with 503."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.away = False
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Silent)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def environment(self) -> dict[str, str]:
        """What makes a client use it."""
        return {
            "AWS_ENDPOINT": f"http://127.0.0.1:{self._server.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def new_place(self) -> str:
        """The URL of an empty place in a new bucket."""
        bucket = f"b{uuid4().hex}"
        signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"}
        request = urllib.request.Request(f"{self.environment['AWS_ENDPOINT']}/{bucket}", method="PUT", headers=signed)
        urllib.request.urlopen(request).close()
        return f"s3://{bucket}/blobs"

    def count(self, method: str) -> int:
        return sum(found == method for found, _ in self.requests)

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        if self.away:
            start("503 Service Unavailable", [("Content-Length", "0")])
            return []
        return self._application(environ, start)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[S3Server, str]]:
    """The server, and the URL of an empty place on it; this process's environment leads there."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    place = s3_server.new_place()
    s3_server.requests.clear()
    yield s3_server, place
    s3_server.away = False
