"""An S3 server on loopback (moto), with a proxy before it that fails when a test says so."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

KEYS = {
    "AWS_ACCESS_KEY_ID": "key-of-the-tests",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-of-the-tests",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def plain_server(monkeypatch: pytest.MonkeyPatch, keys: str) -> Iterator[str]:
    """URI of a bucket with keys in it, on a server without a proxy, and % for the path below it."""
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1&allow_bucket_creation=true"
    yield f"s3://{keys}@bucket%s?{options}"
    server.stop()


OF_A_CONNECTION = ("connection", "transfer-encoding", "content-length", "expect", "server", "date")


@dataclass
class Server:
    """A server with one bucket; credentials are in the environment."""

    address: str
    failing: str = ""
    """Writes whose path holds this fail. Empty: none."""

    failures: list[str] = field(default_factory=list)
    """Paths of writes that failed."""

    how: str = "500"
    """What a failing write meets: an answer 500, or a connection that is cut in the body."""

    requests: list[str] = field(default_factory=list)
    """Method and path of each, where the proxy is asked."""

    def uri(self, folder: str) -> str:
        """Of a folder in the bucket."""
        return f"s3://bucket/{folder}?scheme=http&endpoint_override={self.address}&region=us-east-1"

    def paths(self, folder: str = "") -> list[str]:
        """Of all files below a folder of the bucket, in it."""
        filesystem, base = fs.FileSystem.from_uri(self.uri(folder))
        base = base.rstrip("/")
        infos = filesystem.get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
        return [info.path[len(base) + 1 :] for info in infos if info.type == fs.FileType.File]

    def files(self, folder: str = "") -> dict[str, bytes]:
        """All files below a folder of the bucket, by their paths in it."""
        filesystem, base = fs.FileSystem.from_uri(self.uri(folder))
        found = {}
        for path in self.paths(folder):
            with filesystem.open_input_file(f"{base.rstrip('/')}/{path}") as file:
                found[path] = file.read()  # at once; a stream is read by requests of 16 KB
        return found

    def read(self, path: str) -> bytes:
        """A file of the bucket; nothing where there is none."""
        filesystem, base = fs.FileSystem.from_uri(self.uri(path))
        try:
            with filesystem.open_input_stream(base) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return b""


@contextmanager
def serving(patch: pytest.MonkeyPatch, scratch: Path, *, proxy: bool = False) -> Iterator[Server]:
    """Starts the server; this process and those that it starts have credentials and a scratch folder.

    Args:
        patch: undoes it.
        scratch: for copies of run folders.
        proxy: requests go through one that can fail.
    """
    from moto.server import ThreadedMotoServer

    for name, value in KEYS.items():
        patch.setenv(name, value)
    patch.setenv("RAYEMBED_SCRATCH", str(scratch))
    patch.setattr("rayembed.data.copies._MIRRORS", {})
    patch.setattr("rayembed.data.object_store.WAITS", (0.05, 0.05))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    connection = HTTPConnection(host, port)
    connection.request("POST", "/moto-api/reset")  # servers of one process share what they hold
    connection.getresponse().read()
    filesystem, _ = fs.FileSystem.from_uri(Server(f"{host}:{port}").uri("") + "&allow_bucket_creation=true")
    filesystem.create_dir("bucket")
    server = Server(f"{host}:{port}")
    through = _proxy(server, host, port) if proxy else None
    if proxy:
        patch.setattr("rayembed.data.object_store._located", _of_few_tries)
    try:
        yield server
    finally:
        if through is not None:
            through.shutdown()
            through.server_close()
        moto.stop()


def _of_few_tries(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a URI, which gives up at once; that of pyarrow's own making tries for six seconds."""
    written, _, options = uri.partition("?")
    own = dict(option.split("=") for option in options.split("&"))
    return fs.S3FileSystem(**own, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1)), written[len("s3://") :]


def new_machine(patch: pytest.MonkeyPatch, scratch: Path) -> None:
    """From here on this process is one that was never here before."""
    patch.setenv("RAYEMBED_SCRATCH", str(scratch))
    patch.setattr("rayembed.data.copies._MIRRORS", {})


def _proxy(server: Server, host: str, port: int) -> ThreadingHTTPServer:
    own = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Through, server, (host, port)))
    threading.Thread(target=own.serve_forever, daemon=True).start()
    server.address = f"127.0.0.1:{own.server_address[1]}"
    return own


class _Through(BaseHTTPRequestHandler):
    """Passes a request on, or fails it."""

    protocol_version = "HTTP/1.1"

    def __init__(self, known: Server, target: tuple[str, int], *arguments: Any) -> None:  # noqa: ANN401
        self._known, self._target = known, target
        super().__init__(*arguments)

    def _pass_on(self) -> None:
        known = self._known
        known.requests.append(f"{self.command} {self.path}")
        if self.command in ("PUT", "POST") and known.failing and known.failing in self.path:
            known.failures.append(self.path)
            self._fail()
            return
        connection = HTTPConnection(*self._target, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in OF_A_CONNECTION}
        connection.request(self.command, self.path, self._body(), headers)
        answer = connection.getresponse()
        content = answer.read()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in OF_A_CONNECTION}
        self._answer(answer.status, kept, content, answer.getheader("Content-Length"))
        connection.close()

    def _fail(self) -> None:
        if self._known.how == "cut":
            self.rfile.read(min(3, int(self.headers.get("Content-Length", 3))))
            self.close_connection = True
            self.connection.close()
        else:
            self._body()
            self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>", None)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, status: int, headers: dict[str, str], content: bytes, length: str | None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        of_none = self.command == "HEAD" and length is not None  # of a file that is not in the answer
        self.send_header("Content-Length", str(length) if of_none else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def log_message(self, *_: object) -> None:
        return
