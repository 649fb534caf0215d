"""Refuses cross-site requests: those that another site's page makes in a visitor's browser.

Unless the server is on localhost, Gradio accepts any origin, together with the visitor's cookies. Browsers send the
Origin header with every request that can change state, so it is compared with the host. Programs send no Origin and are
accepted.
"""

from __future__ import annotations

from urllib.parse import urlsplit


class OwnOrigin:
    """ASGI middleware. `behind_proxy` tells whether X-Forwarded-Host can be trusted."""

    def __init__(self, app, behind_proxy: bool = False):
        self.app, self.behind_proxy = app, behind_proxy

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] in ("http", "websocket") and self._foreign(scope):
            await send(
                {
                    "type": "http.response.start",
                    "status": 403,
                    "headers": [(b"content-type", b"application/json"), (b"vary", b"origin")],
                }
            )
            body = b'{"error": "Requests from other sites are refused. Open the page itself, or use gradio_client."}'
            await send({"type": "http.response.body", "body": body})
            return
        await self.app(scope, receive, send)

    def _foreign(self, scope) -> bool:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope.get("headers", ())}
        origin = headers.get(b"origin")
        if origin is None:
            return False
        hosts = {headers.get(b"host", "").lower()}
        if self.behind_proxy and headers.get(b"x-forwarded-host"):
            hosts.add(headers[b"x-forwarded-host"].split(",")[0].strip().lower())
        try:
            parts = urlsplit(origin.lower())
        except ValueError:
            return True
        default = {"http": ":80", "https": ":443"}.get(parts.scheme, "")
        return not ({parts.netloc, parts.netloc + default} & hosts)
