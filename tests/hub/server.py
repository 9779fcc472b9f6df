"""A loopback server that speaks as much of the Hugging Face Hub's HTTP API as uploading and downloading a model needs.

It keeps repositories with branches and commits in memory, asks for a token (401 without, 404 for a private repository
that is not shown) and takes large files through the LFS batch protocol, as the Hub does where Xet is off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
LFS_SUFFIX = ".safetensors"


@dataclass
class Repository:
    """Branches name commits, a commit maps paths to contents; an LFS path's content is its object."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        parent = self.branches.get(branch, "")
        oid = hashlib.sha1(f"{parent}{message}{sorted(files)}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = {**self.commits.get(parent, {}), **files}
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


class Answer(Exception):
    """A response other than 200: its status, the Hub's name for the error, a body."""

    def __init__(self, status: int, code: str = "", body: object = None) -> None:
        super().__init__(status, code)
        self.status, self.code, self.body = status, code, body


class Handler(BaseHTTPRequestHandler):
    """One request; the routes are tried in order."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        try:
            for method, pattern, route in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    groups = {name: unquote(value) for name, value in match.groupdict().items()}
                    answer = route(self, **groups)
                    break
            else:
                raise Answer(501)
        except Answer as error:
            self._send(error.status, json.dumps(error.body or {}).encode(), {"X-Error-Code": error.code})
            return
        if answer is not None:
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _signed_in(self, needed: bool = False) -> bool:
        right = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if needed and not right:
            raise Answer(401)
        return right

    def _repository(self, repo: str) -> Repository:
        found = self.server.repositories.get(repo)
        if found is None or (found.private and not self._signed_in()):
            raise Answer(404 if self._signed_in() else 401, "RepoNotFound")
        return found

    def _commit_of(self, repo: str, revision: str) -> tuple[Repository, str]:
        found = self._repository(repo)
        oid = found.resolve(revision)
        if oid is None:
            raise Answer(404, "RevisionNotFound")
        return found, oid

    def create(self) -> dict:
        self._signed_in(needed=True)
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        answer = {"url": f"{self.server.url}/{name}", "id": name}
        if name in self.server.repositories:
            raise Answer(409, body=answer)
        repository = self.server.repositories[name] = Repository(asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return answer

    def branch(self, repo: str, branch: str) -> dict:
        self._signed_in(needed=True)
        found = self._repository(repo)
        if branch in found.branches:
            raise Answer(409)
        found.branches[branch] = found.branches["main"]
        return {}

    def validate_yaml(self) -> dict:
        if not json.loads(self.body)["content"].startswith("---\n"):
            raise Answer(400)
        return {"errors": [], "warnings": []}

    def preupload(self, repo: str, revision: str) -> dict:
        self._signed_in(needed=True)
        self._commit_of(repo, revision)
        files = json.loads(self.body)["files"]
        modes = {file["path"]: "lfs" if file["path"].endswith(LFS_SUFFIX) else "regular" for file in files}
        return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}

    def lfs_batch(self, repo: str) -> dict:
        self._signed_in(needed=True)
        self._repository(repo)
        asked = json.loads(self.body)
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        for entry in asked["objects"]:
            if entry["oid"] not in self.server.objects:
                places = {"upload": "lfs", "verify": "verify"}
                entry["actions"] = {n: {"href": f"{self.server.url}/{at}/{entry['oid']}"} for n, at in places.items()}
        return {"transfer": "basic", "objects": asked["objects"]}

    def lfs_put(self, oid: str) -> dict:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(400)
        self.server.objects[oid] = self.body
        return {}

    def lfs_verify(self, oid: str) -> dict:
        self._signed_in(needed=True)
        if len(self.server.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Answer(404)
        return {}

    def commit(self, repo: str, revision: str) -> dict:
        self._signed_in(needed=True)
        found, _ = self._commit_of(repo, revision)
        files, message = {}, ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            else:
                large = line["key"] == "lfsFile"
                files[value["path"]] = (
                    self.server.objects[value["oid"]] if large else base64.b64decode(value["content"])
                )
        oid = found.commit(revision, files, message)
        return {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid}

    def info(self, repo: str, revision: str = "main") -> dict:
        found, oid = self._commit_of(repo, revision)
        return {"id": repo, "sha": oid, "private": found.private, "siblings": [], "tags": []}

    def tree(self, repo: str, revision: str) -> list[dict]:
        found, oid = self._commit_of(repo, revision)
        entries = []
        for path, content in found.commits[oid].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if path.endswith(LFS_SUFFIX):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found, oid = self._commit_of(repo, revision)
        content = found.commits[oid].get(path)
        if content is None:
            raise Answer(404, "EntryNotFound")
        large = path.endswith(LFS_SUFFIX)
        etag = hashlib.new("sha256" if large else "sha1", content).hexdigest()
        self._send(200, content, {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "X-Linked-Size": str(len(content))})


ROUTES: list[tuple[str, str, Callable[..., object]]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>[^/]+)", Handler.branch),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("POST", "/verify/(?P<oid>[0-9a-f]{64})", Handler.lfs_verify),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


class HubServer(ThreadingHTTPServer):
    """The server's state: who may write, what it holds, what it was asked."""

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub_server(token: str) -> Iterator[HubServer]:
    """A running server on a free port of 127.0.0.1."""
    server = HubServer(token)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
