"""A local stand-in for the part of the Hub's API that is used here: repos, commits, listings, downloads.

Speaks HTTP on the loopback address, so the real client library is what is tested. It can be stopped and started
again on the same port, and told to answer with an error.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_standinstandinstandinstandinstandin"


@dataclass
class Repo:
    kind: str  # dataset | space | model
    created_with: dict
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)  # the paths of each
    history: list[dict[str, bytes]] = field(default_factory=list)  # the files as each commit left them
    variables: dict[str, str] = field(default_factory=dict)


class HubStandIn:
    """`with HubStandIn() as hub:` serves at `hub.url`. `hub.fail = 503` has every request answered so."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}  # "datasets/user/name"
        self.requests: list[tuple[str, str]] = []
        self.fail: int | None = None
        self.delay_s = 0.0
        self.page_size = 1000
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """From here on the port refuses connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> HubStandIn:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    stand_in: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    def _serve(self) -> None:
        hub = self.stand_in
        if hub._server is None:  # stopped: a kept-alive connection must not be answered either
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        parts = [unquote(p) for p in url.path.strip("/").split("/")]
        hub.requests.append((self.command, url.path))
        time.sleep(hub.delay_s)
        if hub.fail:
            return self._answer(hub.fail, {"error": "told to fail"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        try:
            self._route(parts, parse_qs(url.query), body)
        except KeyError:
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def _route(self, parts: list[str], query: dict, body: bytes) -> None:
        hub = self.stand_in
        match parts:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                kind = asked.get("type", "model")
                key = f"{kind}s/{asked.get('organization') or 'me'}/{asked['name']}"
                if key in hub.repos:
                    return self._answer(
                        409, {"error": "You already created this repo", "url": f"{hub.url}/{key}"}
                    )
                hub.repos[key] = Repo(kind, asked)
                return self._answer(200, {"url": f"{hub.url}/{key}", "name": key.partition("/")[2]})
            case ["api", "validate-yaml"]:
                return self._answer(200, {"errors": [], "warnings": []})
            case ["api", "whoami-v2"]:
                return self._answer(200, {"name": "me", "type": "user", "orgs": []})
            case ["api", kind, user, name]:
                hub.repos[f"{kind}/{user}/{name}"]
                return self._answer(
                    200, {"id": f"{user}/{name}", "sha": "0" * 40, "siblings": [], "tags": []}
                )
            case ["api", kind, user, name, "preupload", _]:
                repo = hub.repos[f"{kind}/{user}/{name}"]
                files = [
                    {
                        "path": f["path"],
                        "uploadMode": "regular",
                        "shouldIgnore": False,
                        "oid": _oid(repo.files.get(f["path"])),
                    }
                    for f in json.loads(body)["files"]
                ]
                return self._answer(200, {"files": files})
            case ["api", kind, user, name, "commit", _]:
                return self._commit(hub.repos[f"{kind}/{user}/{name}"], f"{hub.url}/{user}/{name}", body)
            case ["api", kind, user, name, "paths-info", _]:
                repo = hub.repos[f"{kind}/{user}/{name}"]
                asked = parse_qs(body.decode()).get("paths", [])
                return self._answer(200, [_file(repo, path) for path in asked if path in repo.files])
            case ["api", kind, user, name, "super-squash", _]:
                repo = hub.repos[f"{kind}/{user}/{name}"]
                repo.history = [dict(repo.files)]
                return self._answer(200, {})
            case ["api", kind, user, name, "tree", _, *path]:
                return self._tree(hub.repos[f"{kind}/{user}/{name}"], "/".join(path), query)
            case ["api", "spaces", user, name, "variables"]:
                asked = json.loads(body)
                hub.repos[f"spaces/{user}/{name}"].variables[asked["key"]] = asked["value"]
                return self._answer(200, {})
            case [kind, user, name, "resolve", _, *path]:
                content = hub.repos[f"{kind}/{user}/{name}"].files.get("/".join(path))
                if content is None:
                    return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                return self._send(200, content, {"ETag": f'"{_oid(content)}"'})
        self._answer(404, {"error": f"not part of the stand-in: {self.path}"})

    def _commit(self, repo: Repo, url: str, body: bytes) -> None:
        changed: dict[str, bytes | None] = {}
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                changed[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] in ("deletedFile", "deletedFolder"):
                changed[entry["value"]["path"]] = None
            elif entry["key"] != "header":
                return self._answer(400, {"error": f"not understood here: {entry['key']}"})
        for path, content in changed.items():
            if content is None:
                for each in [p for p in repo.files if p == path or p.startswith(path.rstrip("/") + "/")]:
                    del repo.files[each]
            else:
                repo.files[path] = content
        repo.commits.append(list(changed))
        repo.history.append(dict(repo.files))
        oid = hashlib.sha1(str(len(repo.commits)).encode()).hexdigest()
        self._answer(200, {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid})

    def _tree(self, repo: Repo, folder: str, query: dict) -> None:
        found = sorted(p for p in repo.files if not folder or p.startswith(folder + "/"))
        if not found and folder:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        start, size = int(query.get("cursor", ["0"])[0]), self.stand_in.page_size
        page = [_file(repo, p) for p in found[start : start + size]]
        headers = {}
        if start + size < len(found):
            here = urlsplit(self.path).path
            headers["Link"] = f'<{self.stand_in.url}{here}?recursive=true&cursor={start + size}>; rel="next"'
        self._answer(200, page, headers)

    def _answer(self, status: int, content, headers: dict[str, str] | None = None) -> None:
        self._send(
            status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        )

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _file(repo: Repo, path: str) -> dict:
    content = repo.files[path]
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}


def _oid(content: bytes | None) -> str | None:
    """git's name for a file's content."""
    return None if content is None else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def connected(hub: HubStandIn, monkeypatch):
    """The client library of this process talks to the stand-in, with its token."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    close_session()
    try:
        yield hub
    finally:
        close_session()
