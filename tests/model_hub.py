"""A local stand-in for the Hub where models are downloaded from: files, gated repos, slowness. Real HTTP.

(`hub_stand_in.py` is the other half: repos that are written to.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class ModelRepo:
    files: dict[str, bytes]
    commit: str
    gated: bool = False  # its list is public, its files need the token
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    parameters: int | None = None


class ModelHub:
    """`hub.add("user/name", folder)`, `hub.url`, and what to do to the client: `delay_s`, `chunk_s`, `status`."""

    def __init__(self) -> None:
        self.repos: dict[str, ModelRepo] = {}
        self.requests: list[tuple[str, str]] = []
        self.served_bytes = 0
        self.token = "hf_right"
        self.delay_s = 0.0  # before every answer
        self.chunk_s = 0.0  # between pieces of a file
        self.status: int | None = None  # answer everything with this
        self._closing = threading.Event()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def log_message(self, *_) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Path | dict[str, bytes], **options) -> ModelRepo:
        if isinstance(files, Path):
            files = {
                str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()
            }
        content = repr(sorted((n, hashlib.sha256(b).hexdigest()) for n, b in files.items()))
        commit = hashlib.sha1(f"{name} {content}".encode()).hexdigest()
        self.repos[name] = ModelRepo(dict(files), commit, branches={"main": commit}, **options)
        return self.repos[name]

    def files_asked_for(self) -> list[str]:
        return [
            path.split("/resolve/")[1].split("/", 1)[1] for _, path in self.requests if "/resolve/" in path
        ]

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        parts = urlsplit(request.path)
        path = unquote(parts.path).strip("/")
        self.requests.append((request.command, path))
        self._closing.wait(self.delay_s)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if self.status:
                self._send(request, self.status, {}, b"trouble", body)
            elif path == "api/models":
                self._search(request, parse_qs(parts.query), body)
            elif "/tree/" in path:
                name, _, revision = path.removeprefix("api/models/").partition("/tree/")
                self._tree(request, name, revision, body)
            elif path.endswith("/auth-check"):
                name = path.removeprefix("api/models/").removesuffix("/auth-check")
                repo = self._find(request, name, "main", body)
                if repo and repo.gated and not request.headers.get("Authorization"):
                    self._send(request, 401, {"X-Error-Code": "GatedRepo"}, b"", body)
                elif repo:
                    self._send(request, 200, {}, b"", body)
            elif path.startswith("api/models/"):
                name, _, revision = path.removeprefix("api/models/").partition("/revision/")
                self._info(request, name, revision or "main", body)
            elif "/resolve/" in path:
                name, _, rest = path.partition("/resolve/")
                revision, _, file = rest.partition("/")
                self._file(request, name, revision, file, body)
            else:
                self._send(request, 404, {}, b"", body)

    def _find(self, request, name: str, revision: str, body: bool) -> ModelRepo | None:
        repo = self.repos.get(name)
        authorization = request.headers.get("Authorization")
        if authorization and authorization != f"Bearer {self.token}":
            self._send(
                request, 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b"", body
            )
        elif repo is None or (repo.private and not authorization):
            self._send(request, 401, {"X-Error-Code": "RepoNotFound"}, b"", body)
        elif revision not in repo.branches and revision != repo.commit:
            self._send(request, 404, {"X-Error-Code": "RevisionNotFound"}, b"", body)
        else:
            return repo
        return None

    def _info(self, request, name: str, revision: str, body: bool) -> None:
        if repo := self._find(request, name, revision, body):
            siblings = [{"rfilename": n, "size": len(b), "blobId": "0"} for n, b in repo.files.items()]
            answer = {"id": name, "sha": repo.commit, "siblings": siblings, "gated": repo.gated, "tags": []}
            if repo.parameters:
                answer["safetensors"] = {"parameters": {"BF16": repo.parameters}, "total": repo.parameters}
            self._json(request, answer, body)

    def _tree(self, request, name: str, revision: str, body: bool) -> None:
        if repo := self._find(request, name, revision, body):
            files = [{"type": "file", "path": n, "size": len(b), "oid": "0"} for n, b in repo.files.items()]
            self._json(request, files, body)

    def _search(self, request, query: dict[str, list[str]], body: bool) -> None:
        wanted = query.get("search", [""])[0].lower()
        names = [{"id": n} for n in self.repos if wanted in n.lower()]
        self._json(request, names[: int(query.get("limit", ["10"])[0])], body)

    def _file(self, request, name: str, revision: str, file: str, body: bool) -> None:
        repo = self._find(request, name, revision, body)
        if repo is None:
            return
        if repo.gated and not request.headers.get("Authorization"):
            self._send(request, 401, {"X-Error-Code": "GatedRepo"}, b"", body)
            return
        if file not in repo.files:
            self._send(
                request, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit}, b"", body
            )
            return
        data = repo.files[file]
        etag = hashlib.sha256(data).hexdigest()
        headers = {
            "ETag": f'"{etag}"',
            "X-Repo-Commit": repo.commit,
            "Content-Type": "application/octet-stream",
        }
        if (wanted := request.headers.get("Range", "")).startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            self._send(request, 206, headers, data[int(first) : int(last or len(data)) + 1], body)
            return
        self._send(request, 200, headers, data, body)

    def _json(self, request, value, body: bool) -> None:
        self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(value).encode(), body)

    def _send(self, request, status: int, headers: dict[str, str], data: bytes, body: bool) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        step = 2**16
        for start in range(0, len(data) if body else 0, step):
            request.wfile.write(data[start : start + step])
            self.served_bytes += min(step, len(data) - start)
            if self.chunk_s and self._closing.wait(self.chunk_s):
                request.close_connection = True
                return


@contextlib.contextmanager
def model_hub() -> Iterator[ModelHub]:
    hub = ModelHub()
    try:
        yield hub
    finally:
        hub.close()


@contextlib.contextmanager
def as_the_hub(home: Path, monkeypatch) -> Iterator[ModelHub]:
    """A stand-in that this process takes for the Hub, with an empty cache in `home` and without a login."""
    from comparator.sources import hub, hub_headers

    def forget() -> None:
        for known in (hub._listings, hub._searches, hub_headers._known):
            known.clear()

    with model_hub() as stand_in:
        monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
        monkeypatch.setenv("HF_HOME", str(home))
        for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        forget()
        yield stand_in
    forget()


def wait_until(condition, seconds: float = 10.0) -> bool:
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        if condition():
            return True
        time.sleep(0.02)
    return False
