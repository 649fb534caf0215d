"""OpenAI-compatible servers by name: the setting COMPARATOR_ENDPOINTS, and their keys, which only the environment holds."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from comparator.core.errors import UserError

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
KEY_VARIABLE = "COMPARATOR_ENDPOINT_KEY_"
EXAMPLE = "COMPARATOR_ENDPOINTS=vllm=http://10.0.0.5:8000/v1"


@dataclass(frozen=True)
class Endpoint:
    """A server. `name` is "" for an address that was typed; `model` None: the one model that the server has."""

    name: str
    url: str
    model: str | None = None

    @property
    def key_variable(self) -> str:
        """The environment variable that holds its key; "" for an address that was typed, which gets none."""
        return KEY_VARIABLE + self.name.upper().replace("-", "_") if self.name else ""

    @property
    def key(self) -> str | None:
        return os.environ.get(self.key_variable) or None if self.name else None


def is_address(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def parse_endpoints(text: str) -> dict[str, Endpoint]:
    """`vllm=http://10.0.0.5:8000/v1 ollama=http://…/v1#model` → servers by name. Raises `UserError`."""
    endpoints: dict[str, Endpoint] = {}
    for part in text.split():
        name, equals, address = part.partition("=")
        if not equals or not NAME.fullmatch(name):
            raise UserError(
                f"“{(name if equals else part)[:60]}” in COMPARATOR_ENDPOINTS is not NAME=ADDRESS.",
                f"Write {EXAMPLE}, with spaces between several; a name has lower-case letters, digits, - and _.",
            )
        if name in endpoints:
            raise UserError(f"“{name}” appears twice in COMPARATOR_ENDPOINTS.", "Keep one of them.")
        endpoints[name] = replace(parse_address(address), name=name)
    return endpoints


def parse_address(text: str) -> Endpoint:
    """`http://host:8000/v1#model` → a server without a name. Raises `UserError`, which does not quote credentials."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        raise UserError(
            "An endpoint's address begins with http:// or https:// and a host.", f"Write {EXAMPLE}."
        )
    if parts.username is not None or parts.password is not None or parts.query:
        raise UserError(
            "An endpoint's address contains a password or a query, which would appear in every saved comparison.",
            f"List the server in COMPARATOR_ENDPOINTS, and put its key into {KEY_VARIABLE}NAME.",
        )
    url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
    return Endpoint("", url, parts.fragment or None)


def find_endpoint(source: str, endpoints: str) -> Endpoint:
    """The server that a variant's source names, `endpoints` being the setting. Raises `UserError` for an unknown name."""
    if is_address(source):
        return parse_address(source)
    known = parse_endpoints(endpoints)
    if source not in known:
        there = f"The names are {', '.join(known)}." if known else "None is listed."
        raise UserError(
            f"There is no endpoint “{source[:60]}” here.",
            f"{there} List it: {EXAMPLE.replace('vllm=', 'NAME=')}.",
        )
    return known[source]
