"""What stands before the page: security headers, the host that was asked, a limit on bodies, and a token.

    Headers → Hosts → OwnOrigin (origin_guard.py) → BodyLimit → VisitorQuota (in public mode) → Token → PageCache → Gradio, whose own
    login comes last

Each is ASGI middleware and judges nothing but a request's head, so nothing of a request is kept in memory before it has
passed. `middleware(settings, token)` has them in order.

Hosts is against DNS rebinding: a stranger's domain that resolves to 127.0.0.1 makes a browser treat the stranger's page
as this server's own, with a matching Origin; but its name is in Host. Where a login stands before everything, such a
page has no cookie and any host is accepted, unless COMPARATOR_ALLOWED_HOSTS lists some.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import secrets
import socket
from urllib.parse import parse_qsl, quote, urlencode

from starlette.middleware import Middleware

from comparator.core.settings import Settings
from comparator.deploy.limits import auth_pairs
from comparator.deploy.space import on_space
from comparator.ui.gradio_compat import STARTUP_PATH, UPLOAD_PATH
from comparator.ui.listeners import Listening
from comparator.ui.login_guard import LoginGuard
from comparator.ui.origin_guard import OwnOrigin
from comparator.ui.page_cache import PageCache
from comparator.ui.visitor_quota import VisitorQuota

BODY_BYTES = 8_000_000  # of any request but an upload; the longest prompt that is allowed has some 0.2 MB
_MULTIPART_BYTES = 1_000_000  # what an upload's form has beside the file
_HOST = re.compile(r"(\[(?P<v6>[0-9a-f:.%]+)\]|(?P<name>[^\[\]:@/]*))(:[0-9]*)?")
_HUB = "https://huggingface.co https://*.huggingface.co"


def middleware(settings: Settings, token: str | None) -> list[Middleware]:
    """Everything that a request passes through, outermost first. `token` is what `new_token` returned."""
    layers = [
        Middleware(Headers, embedded=on_space()),
        Middleware(Hosts, hosts=allowed_hosts(settings), any_address=_is_any(settings.host)),
        Middleware(OwnOrigin, behind_proxy=settings.behind_proxy),
        Middleware(BodyLimit, most=BODY_BYTES, upload=settings.max_upload_bytes + _MULTIPART_BYTES),
        *([Middleware(VisitorQuota, settings=settings, most_body=BODY_BYTES)] if settings.public else []),
        Middleware(Listening),
        Middleware(LoginGuard, settings=settings),
    ]
    layers += [Middleware(Token, token=token)] if token else []
    return layers + ([] if auth_pairs(settings) else [Middleware(PageCache)])


def new_token(settings: Settings) -> str | None:
    """A random token where other machines can reach the app and neither a login nor public mode says who may; else None."""
    if settings.public or auth_pairs(settings) or _is_loopback(settings.host):
        return None
    return secrets.token_urlsafe(24)


def allowed_hosts(settings: Settings) -> frozenset[str] | None:
    """Names that requests may ask for, without ports; None: any."""
    listed = {h.strip().lower() for h in settings.allowed_hosts.split(",") if h.strip()}
    if "*" in listed or (not listed and (settings.public or auth_pairs(settings))):
        return None
    own = {settings.host.lower(), os.environ.get("SPACE_HOST", "").lower()}
    if _is_any(settings.host):
        own |= {socket.gethostname().lower(), f"{socket.gethostname()}.local".lower()}
    return frozenset((own | listed) - {""})


class Headers:
    """Adds the security headers that an answer does not have yet.

    Gradio's page needs inline scripts and styles and `eval` (its own configuration, and what listeners run in the
    browser), so the policy does not stop a script that got into the page; it stops other servers from being asked,
    plugins, foreign frames around the page, and forms and relative addresses that lead elsewhere.
    """

    def __init__(self, app, embedded: bool = False):
        """`embedded`: on a Space, whose page is a frame in one of the Hub's."""
        self.app = app
        hub = f" {_HUB}" if embedded else ""
        policy = (
            "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
            f"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:{hub}; font-src 'self' data:; "
            f"media-src 'self' data: blob:; connect-src 'self' data: blob:{hub}; worker-src 'self' blob:; "
            f"object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'{hub}"
        )
        self.headers = (
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"same-origin"),  # the address has the id of a comparison in it
            (b"content-security-policy", policy.encode()),
        )

    async def __call__(self, scope, receive, send) -> None:
        async def with_headers(message) -> None:
            if message["type"] == "http.response.start":
                there = {name.lower() for name, _ in message.get("headers", ())}
                new = [h for h in self.headers if h[0] not in there]
                message = {**message, "headers": [*message.get("headers", ()), *new]}
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


class Hosts:
    """Refuses requests for a host that is not this server's."""

    def __init__(self, app, hosts: frozenset[str] | None, any_address: bool = False):
        """`hosts` None: every host is taken. `any_address`: addresses are taken too, since no name resolves to them."""
        self.app, self.hosts, self.any_address = app, hosts, any_address

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] in ("http", "websocket") and not self.takes(_headers(scope, b"host")):
            advice = (
                "Use localhost, or set COMPARATOR_ALLOWED_HOSTS to the names under which the app is reached."
            )
            await refuse(scope, send, 403, f"This server does not answer requests for that host. {advice}")
            return
        await self.app(scope, receive, send)

    def takes(self, values: list[str]) -> bool:
        """Whether a request with these Host headers is answered."""
        if self.hosts is None:
            return True
        if len(values) != 1:
            return False
        name = _without_port(values[0])
        return name in self.hosts or _is_loopback(name) or (self.any_address and _address(name) is not None)


class BodyLimit:
    """Answers 413 to a body that is too large: by its Content-Length unread, in chunks once it exceeds the limit.

    Frameworks read a JSON body whole before they ask who sent it, so this comes before any login.
    """

    def __init__(self, app, most: int, upload: int):
        """Both in bytes; `upload` is for files."""
        self.app, self.most, self.upload = app, most, upload

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = self.upload if scope["path"].endswith(UPLOAD_PATH) else self.most
        problem = f"The request's body has more than {most / 1e6:,.0f} MB, which is the limit here."
        if any(not _at_most(length, most) for length in _headers(scope, b"content-length")):
            await refuse(scope, send, 413, problem)
            return
        read, started, exceeded = 0, False, False

        async def counted():
            nonlocal read, exceeded
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > most:
                    exceeded = True
                    raise _TooLarge
            return message

        async def answered(message) -> None:
            nonlocal started
            if exceeded and not started:
                return  # the framework's answer to a body that it could not read
            started = True
            await send(message)

        try:
            await self.app(scope, counted, answered)
        except _TooLarge:
            if started:
                raise
        if exceeded and not started:
            await refuse(scope, send, 413, problem)


def _at_most(length: str, most: int) -> bool:
    return length.isascii() and length.isdigit() and len(length) < 20 and int(length) <= most


class _TooLarge(Exception):
    pass


class Token:
    """Lets in who has the token: once as ?token=…, then by a cookie; programs by `Authorization: Bearer …`."""

    def __init__(self, app, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] not in ("http", "websocket") or self._is_known(scope) or _is_own_start(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and self._is_in_query(scope):
            await self._welcome(scope, send)
        else:
            advice = "Open the address that the program printed when it started, which ends in ?token=…"
            await refuse(scope, send, 401, f"{advice} Programs send it as “Authorization: Bearer TOKEN”.")

    def _is_known(self, scope) -> bool:
        name, cookies = self._cookie_name(scope), "; ".join(_headers(scope, b"cookie"))
        tokens = [c.strip()[len(name) + 1 :] for c in cookies.split(";") if c.strip().startswith(f"{name}=")]
        tokens += [h[7:].strip() for h in _headers(scope, b"authorization") if h[:7].lower() == "bearer "]
        return any(self._is_right(text) for text in tokens[:8])

    def _is_in_query(self, scope) -> bool:
        return any(name == "token" and self._is_right(value) for name, value in _query(scope))

    def _is_right(self, text: str) -> bool:
        return hmac.compare_digest(text.encode("utf-8", "replace"), self.token.encode())

    async def _welcome(self, scope, send) -> None:
        """Keep the token in a cookie and go to the same page without it, so that it is in no history and no referrer."""
        rest = urlencode([(n, v) for n, v in _query(scope) if n != "token"], safe="/:,@")
        path = "/" + scope["path"].lstrip("/\\")  # two slashes would begin the name of another host
        place = quote(scope.get("root_path", "").rstrip("/") + path, safe="/=") + (f"?{rest}" if rest else "")
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = f"{self._cookie_name(scope)}={self.token}; Path=/; HttpOnly; SameSite=Lax{secure}"
        headers = [
            (b"location", place.encode()),
            (b"set-cookie", cookie.encode()),
            (b"cache-control", b"no-store"),
        ]
        await send(
            {"type": "http.response.start", "status": 303, "headers": [*headers, (b"content-length", b"0")]}
        )
        await send({"type": "http.response.body", "body": b""})

    def _cookie_name(self, scope) -> str:
        """Cookies are a host's, whatever the port; two apps on one machine have one each."""
        return f"comparator-token-{(scope.get('server') or ('', 0))[1]}"


async def refuse(scope, send, status: int, why: str) -> None:
    """Answer with a sentence, and close the connection: there may be a body on it that nobody will read."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = why.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope.get("method") == "HEAD" else body})


def _is_own_start(scope) -> bool:
    """Gradio's launch asks for this by HTTP and ends where it is refused; it answers true and does nothing else."""
    return scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == STARTUP_PATH


def _headers(scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope.get("headers", ()) if key.lower() == name]


def _query(scope) -> list[tuple[str, str]]:
    text = scope.get("query_string", b"")[:200_000].decode("latin-1")
    try:
        return parse_qsl(text, keep_blank_values=True, max_num_fields=300)
    except ValueError:
        return []


def _without_port(host: str) -> str:
    """`[::1]:7860` → `::1`, `Localhost.:80` → `localhost`, "" for what is no host."""
    match = _HOST.fullmatch(host.strip().lower())
    return "" if match is None else match["v6"] or match["name"].removesuffix(".")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def _is_any(host: str) -> bool:
    address = _address(host)
    return address is not None and address.is_unspecified
