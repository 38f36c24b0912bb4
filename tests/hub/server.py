"""A Hub for tests: the part of its HTTP interface that a push, a download and ranged reads need, on a loopback port.

It keeps commits as whole file maps and large files by sha256, as the Hub does. `requests` is what it was asked for,
`sent` how many bytes it answered with. A file may be a `Path`: one of many GB can be sparse on the disk.
Known tokens: "writer" may do all, "reader" may only read; any other gets 401.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """`files` maps commit -> path -> contents, `branches` a branch -> its head; of a gated one only lists are given."""

    private: bool
    files: dict[str, dict[str, Any]] = field(default_factory=lambda: {"0" * 40: {".gitattributes": b"*\n"}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    gated: bool = False


@dataclass
class Hub:
    """The state; `lose` is a tensor that headers come back without, `lose_file` a file that lists come back without.

    `whole_files`: ranges are not understood.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    lose: str = ""
    lose_file: str = ""
    whole_files: bool = False
    sent: int = 0
    url: str = ""


class Refusal(Exception):
    """Ends a request; the arguments are status, message and the Hub's error code."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: with it, each reply waits 40 ms for an ACK
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        try:
            with self.hub.lock:
                self.hub.requests.append(f"{self.command} {path}")
                reply = self._route(path, body)
            status, value, headers = reply if isinstance(reply, tuple) else (200, reply, {})
        except Refusal as refusal:
            status, message, code = refusal.args
            value, headers = {"error": message}, {"X-Error-Code": code, "X-Error-Message": message}
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key, text)
        data = b"" if self.command == "HEAD" else data
        with self.hub.lock:
            self.hub.sent += len(data) + sum(map(len, self._headers_buffer))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_PUT = do_HEAD = do_GET

    def _route(self, path: str, body: bytes) -> Any:
        """A JSON value or bytes for status 200, or a tuple of status, value and headers."""
        if path.startswith("/lfs/"):  # signed URLs carry no token
            oid = hashlib.sha256(body).hexdigest()
            if path != f"/lfs/{oid}":
                raise Refusal(400, "sha256 differs", "")
            self.hub.blobs[oid] = body
            return b""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("writer", "reader"):
            raise Refusal(401, f"Invalid credentials in Authorization header: {token}", "")
        if token == "reader" and self.command == "POST" and path != "/api/validate-yaml":
            raise Refusal(403, f"{token} has no write access", "")
        for pattern, answer in ROUTES:
            if match := re.fullmatch(pattern, path):
                return answer(self, body, *match.groups())
        raise Refusal(404, "no such route", "")

    def _repo(self, repo_id: str, revision: str = "main") -> tuple[Repo, str]:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        commit = repo.branches.get(revision, revision)
        if commit not in repo.files:
            raise Refusal(404, "Revision not found", "RevisionNotFound")
        return repo, commit

    def create(self, body: bytes) -> Any:
        wish = json.loads(body)
        repo_id = f"{wish['organization']}/{wish['name']}"
        reply = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            return 409, reply, {}
        self.hub.repos[repo_id] = Repo(private=wish.get("visibility") == "private")
        return reply

    def validate(self, body: bytes) -> Any:
        bad = "reject: me" in json.loads(body)["content"]
        return (400 if bad else 200), {"errors": [{"message": '"reject" is no key'}] * bad, "warnings": []}, {}

    def info(self, _: bytes, repo_id: str, revision: str = "main") -> Any:
        repo, commit = self._repo(repo_id, revision)
        files = repo.files[commit].items()
        siblings = [{"rfilename": name, "size": _size(data)} for name, data in files if name != self.hub.lose_file]
        return {"id": repo_id, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []}

    def branch(self, _: bytes, repo_id: str, name: str) -> Any:
        repo, commit = self._repo(repo_id)
        status = 409 if name in repo.branches else 200
        repo.branches.setdefault(name, commit)
        return status, {}, {}

    def preupload(self, body: bytes, repo_id: str, revision: str) -> Any:
        repo, commit = self._repo(repo_id, revision)
        return {"files": [_mode(file["path"], repo.files[commit]) for file in json.loads(body)["files"]]}

    def batch(self, body: bytes, _: str) -> Any:
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def commit(self, body: bytes, repo_id: str, branch: str) -> Any:
        repo, parent = self._repo(repo_id, branch)
        files = dict(repo.files[parent])
        for entry in map(json.loads, body.splitlines()):
            kind, value = entry["key"], entry["value"]
            if kind == "deletedFile":
                del files[value["path"]]
            elif kind != "header":
                stored = self.hub.blobs.get(value.get("oid"))
                files[value["path"]] = base64.b64decode(value["content"]) if stored is None else stored
        commit = hashlib.sha1(parent.encode() + body).hexdigest()
        repo.files[commit], repo.branches[branch] = files, commit
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit}"}

    def tree(self, _: bytes, repo_id: str, revision: str) -> Any:
        repo, commit = self._repo(repo_id, revision)
        files = repo.files[commit].items()
        return [{"type": "file", "path": name, "size": _size(data), "oid": _etag(data)} for name, data in files]

    def resolve(self, _: bytes, repo_id: str, revision: str, name: str) -> Any:
        repo, commit = self._repo(repo_id, revision)
        if repo.gated:
            raise Refusal(403, "Access to this model is restricted", "GatedRepo")
        if name not in repo.files[commit]:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        data = repo.files[commit][name]
        if self.hub.lose:
            data = _without(data, self.hub.lose)
        size, asked = _size(data), self.headers["Range"]
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return 200, b"", headers | {"Content-Length": str(size)}
        if asked is None or self.hub.whole_files:
            return 200, _part(data, 0, size), headers
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        last = min(last, size - 1)
        return 206, _part(data, first, last + 1), headers | {"Content-Range": f"bytes {first}-{last}/{size}"}


ID = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Any]] = [
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate),
    (rf"/api/models/{ID}(?:/revision/(.+))?", lambda h, body, repo, rev: h.info(body, repo, rev or "main")),
    (rf"/api/models/{ID}/tree/([^/]+)/?", Handler.tree),
    (rf"/api/models/{ID}/branch/(.+)", Handler.branch),
    (rf"/api/models/{ID}/preupload/(.+)", Handler.preupload),
    (rf"/api/models/{ID}/commit/(.+)", Handler.commit),
    (rf"/{ID}\.git/info/lfs/objects/batch", Handler.batch),
    (rf"/{ID}/resolve/([^/]+)/(.+)", Handler.resolve),
]


def _size(data: bytes | Path) -> int:
    return data.stat().st_size if isinstance(data, Path) else len(data)


def _part(data: bytes | Path, first: int, end: int) -> bytes:
    if isinstance(data, bytes):
        return data[first:end]
    with data.open("rb") as handle:
        handle.seek(first)
        return handle.read(end - first)


def _etag(data: bytes | Path) -> str:
    """By contents, since the client's cache is; a file on the disk never changes."""
    return hashlib.sha1(data if isinstance(data, bytes) else str(data).encode()).hexdigest()


def _mode(name: str, files: dict[str, bytes]) -> dict[str, Any]:
    """How `name` is uploaded, and the id of what is there: sha256 of a large file, git's blob id of a small one."""
    large, data = name.endswith(".safetensors"), files.get(name)
    reply: dict[str, Any] = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    if data is not None:
        reply["oid"] = (hashlib.sha256(data) if large else hashlib.sha1(b"blob %d\0" % len(data) + data)).hexdigest()
    return reply


def _without(data: bytes, tensor: str) -> bytes:
    """A safetensors file whose header does not mention `tensor`, padded to its old length."""
    length = int.from_bytes(data[:8], "little")
    header = {name: entry for name, entry in json.loads(data[8 : 8 + length]).items() if name != tensor}
    return data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(length) + data[8 + length :]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub})) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        try:
            yield hub
        finally:
            server.shutdown()
