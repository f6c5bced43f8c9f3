"""A web server and object store in one, on 127.0.0.1: files of a dictionary by path (`bucket/key`)."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class Store(ThreadingHTTPServer):
    """Answers GET, HEAD, PUT and S3's list of objects; counts the requests that read content."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.reads: list[str] = []
        self.cut: set[str] = set()
        """Paths of which half is sent."""
        self.broken: set[str] = set()
        """Paths that cannot be written or read."""
        self.order: list[str] = []
        """Paths in the order they were written."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve() -> Iterator[Store]:
    """Run a store in a thread."""
    store = Store()
    thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            if self.path.partition("?")[0][1:] in self.server.cut:
                content = content[: len(content) // 2]
                self.close_connection = True
            self.wfile.write(content)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path)[1:], parse_qs(parts.query)
        if "list-type" in query:
            return self.list_objects(path.rstrip("/"), query.get("prefix", [""])[0])
        content = self.server.files.get(path)
        if path in self.server.broken:
            self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif content is None:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            if self.command == "GET":
                self.server.reads.append(path)
            etag = f'"{hashlib.md5(content).hexdigest()}"'
            self.answer(200, content, ETag=etag, Last_Modified="Wed, 25 Nov 2026 10:00:00 GMT")

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        path = unquote(urlsplit(self.path).path)[1:]
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if path in self.server.broken:
            return self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        self.server.files[path] = content
        self.server.order.append(path)
        self.answer(200, ETag=f'"{hashlib.md5(content).hexdigest()}"')

    def list_objects(self, bucket: str, prefix: str) -> None:
        entries = "".join(
            f"<Contents><Key>{escape(path.partition('/')[2])}</Key><Size>{len(content)}</Size>"
            f'<ETag>"{hashlib.md5(content).hexdigest()}"</ETag><LastModified>2026-11-25T10:00:00.000Z</LastModified>'
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for path, content in sorted(self.server.files.items())
            if path.startswith(f"{bucket}/{prefix}")
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        self.answer(200, body.encode(), Content_Type="application/xml")
