"""A loopback server that speaks as much of the Hub's HTTP API as streaming one dataset needs."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT, OBJECT = "a" * 40, "b" * 40


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: DatasetServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path, files = urlsplit(self.path).path, self.server.files
        if match := re.fullmatch(rf"/datasets/{self.server.name}/resolve/[^/]+/(.*)", path):
            if match[1] in files:
                self._send_file(files[match[1]])
            else:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif match := re.fullmatch(rf"/api/datasets/{self.server.name}/tree/[^/]+/?(.*)", path):
            self._send(200, json.dumps(self._listing(match[1])).encode())
        elif re.fullmatch(rf"/api/datasets/{self.server.name}(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in files]
            about = {"id": self.server.name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
            self._send(200, json.dumps(about).encode())
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _listing(self, folder: str) -> list[dict]:
        """The entries of a folder, "" for the top."""
        entries = {}
        for name, content in self.server.files.items():
            inside = name.removeprefix(f"{folder}/") if folder else name
            if folder and inside == name:
                continue
            first, _, rest = inside.partition("/")
            path = f"{folder}/{first}" if folder else first
            kind, size = ("directory", 0) if rest else ("file", len(content))
            entries[path] = {"type": kind, "oid": OBJECT, "size": size, "path": path}
        return list(entries.values())

    def _send_file(self, content: bytes) -> None:
        headers = {"ETag": f'"{OBJECT}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], headers)
        else:
            self._send(200, content, headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            self.server.sent += len(content)


class DatasetServer(ThreadingHTTPServer):
    """One public dataset: files by their path; `sent` counts the bytes of all bodies."""

    daemon_threads = True

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.files, self.sent = name, files, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve(name: str, files: dict[str, bytes]) -> Iterator[DatasetServer]:
    """A running server of one dataset."""
    with DatasetServer(name, files) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
