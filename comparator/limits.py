"""What one visitor may ask for, and how often. Each refusal says which limit it was and how to go on.

    limits = limits_of(settings)
    limits.check(request, prompt_tokens=…, facts=…)   # pure; call it again when more is known
    gate = Gate(limits)
    gate.admit(visitor(headers, client_host, settings))

On a machine of one's own only the settings that were set hold, and paths are welcome. In public mode every limit
has a value, and models come from the Hub or are built in, never from a path. Knows nothing of the page: a visitor
is a text, a request is `types.Request`.
"""

from __future__ import annotations

import ipaddress
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from comparator.settings import Settings
from comparator.sources import builtin_names
from comparator.types import ModelFacts, Problem, Request

# What holds in public mode where the setting is not given; docs/space.md lists them.
PUBLIC = {
    "requests_per_minute": 6,
    "requests_per_minute_total": 60,
    "max_tokens_per_comparison": 8_192,
    "max_evaluation_characters": 50_000,
    "max_model_parameters": "9B",
}
_CHARACTERS_A_TOKEN = (
    20  # a prompt with more than this many characters a token is refused before it is tokenized
)
_WINDOW_S = 60.0
_MOST_VISITORS = 10_000
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?", re.ASCII)


@dataclass(frozen=True)
class Limits:
    """None: no limit. Sizes are per request."""

    public: bool = False
    max_columns: int = 8
    max_new_tokens: int = 1024
    max_prompt_tokens: int = 8192
    max_tokens_per_comparison: int | None = None  # columns × new tokens × repeats
    max_evaluation_characters: int | None = None
    max_model_parameters: int | None = None
    allowed_models: tuple[str, ...] = ()  # () : every one
    requests_per_minute: int | None = None  # a visitor
    requests_per_minute_total: int | None = None

    def check(
        self, request: Request, *, prompt_tokens: int | None = None, facts: ModelFacts | None = None
    ) -> None:
        """Raises `Problem` naming the first limit that the request is over. What is not known yet is not judged."""
        self.check_sources(request)
        columns, settings = len(request.cells), request.settings
        if columns > self.max_columns:
            raise _over(
                "columns", columns, self.max_columns, "MAX_COLUMNS", "Untick some variants or adapters."
            )
        if settings.max_new_tokens > self.max_new_tokens:
            raise _over(
                "new tokens",
                settings.max_new_tokens,
                self.max_new_tokens,
                "MAX_NEW_TOKENS",
                "Ask for a shorter answer.",
            )
        runs = max(1, settings.repeats) * (2 if settings.decode == "both" else 1)  # eager too
        total = columns * settings.max_new_tokens * runs
        if self.max_tokens_per_comparison is not None and total > self.max_tokens_per_comparison:
            raise _over(
                f"tokens in one comparison ({columns} columns × {settings.max_new_tokens} new tokens × "
                f"{runs} runs)",
                total,
                self.max_tokens_per_comparison,
                "MAX_TOKENS_PER_COMPARISON",
                "Take fewer columns, fewer repeats or a shorter answer.",
            )
        characters = len(request.prompt) + len(request.system or "")
        if characters > self.max_prompt_tokens * _CHARACTERS_A_TOKEN:
            raise _over(
                "characters in the prompt",
                characters,
                self.max_prompt_tokens * _CHARACTERS_A_TOKEN,
                "MAX_PROMPT_TOKENS",
                "Shorten the prompt.",
            )
        if prompt_tokens is not None and prompt_tokens > self.max_prompt_tokens:
            raise _over(
                "prompt tokens",
                prompt_tokens,
                self.max_prompt_tokens,
                "MAX_PROMPT_TOKENS",
                "Shorten the prompt.",
            )
        text = request.evaluation.text if request.fidelity == "text" else None
        most = self.max_evaluation_characters
        if text is not None and most is not None and len(text) > most:
            raise _over(
                "characters in the text that fidelity is measured on",
                len(text),
                most,
                "MAX_EVALUATION_CHARACTERS",
                "Take a part of it.",
            )
        if facts is not None:
            self.check_size(facts)

    def check_size(self, facts: ModelFacts) -> None:
        """Raises `Problem` if the model has more parameters than are taken here."""
        most = self.max_model_parameters
        if most is not None and facts.parameters is not None and facts.parameters > most:
            raise Problem(
                f"{facts.source} has {_count(facts.parameters)} parameters; this server takes models of up to "
                f"{_count(most)} (COMPARATOR_MAX_MODEL_PARAMETERS).",
                "Choose a smaller model, or run Quant Comparator on your own machine.",
            )

    def check_sources(self, request: Request) -> None:
        """Raises `Problem` for a path in public mode, and for a source that the allow-list has not."""
        self.check_source(request.model, "model")
        for cell in request.cells:
            if cell.variant.source:
                self.check_source(cell.variant.source, "checkpoint")
            for option, value in cell.variant.options:
                if self.public and value is not None and _is_path(value):
                    raise Problem(
                        f"“{option}={value[:100]}” names a file, and a public server opens none of its own for visitors.",
                        "Leave the option out, or run Quant Comparator on your own machine.",
                    )
            if cell.adapter is not None:
                self.check_source(cell.adapter.source, "adapter")
        if self.public and request.max_memory:
            raise Problem("Memory limits are the server's own here.", "Leave the memory setting empty.")

    def check_source(self, name: str, what: str = "model") -> None:
        """Raises `Problem` if a model, checkpoint or adapter of this name is not taken here."""
        if name in builtin_names() or (
            what == "adapter" and re.fullmatch(r"[a-z0-9-]+", name) and not _is_path(name)
        ):
            return  # ours: an adapter's name without a user can be nothing else
        if self.public and (not _HUB_NAME.fullmatch(name) or ".." in name or _is_path(name)):
            raise Problem(
                f"“{name[:100]}” is not taken as {_a(what)}: on a public server a {what} is built in or comes from the "
                "Hub, not from a path.",
                "Write user/name, or run Quant Comparator on your own machine to use local files.",
            )
        if self.allowed_models and not self._allows(name):
            raise Problem(
                f"“{name[:100]}” is not on this server's list (COMPARATOR_ALLOWED_MODELS).",
                f"It takes {', '.join(self.allowed_models[:8])}{' …' if len(self.allowed_models) > 8 else ''}.",
            )

    def _allows(self, name: str) -> bool:
        repo = name.partition("@")[0].lower()
        return any(
            repo.startswith(allowed[:-1]) if allowed.endswith("/*") else repo == allowed.partition("@")[0]
            for allowed in (a.lower() for a in self.allowed_models)
        )


def limits_of(settings: Settings) -> Limits:
    """The limits that hold with these settings. Raises `Problem` naming a setting that cannot be read."""

    def value(name: str):
        given = getattr(settings, name)
        return PUBLIC[name] if given is None and settings.public else given

    parameters = value("max_model_parameters")
    return Limits(
        public=settings.public,
        max_columns=settings.max_columns,
        max_new_tokens=settings.max_new_tokens,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_tokens_per_comparison=value("max_tokens_per_comparison"),
        max_evaluation_characters=value("max_evaluation_characters"),
        max_model_parameters=None if parameters is None else parse_count(parameters),
        allowed_models=tuple(filter(None, (m.strip() for m in settings.allowed_models.split(",")))),
        requests_per_minute=value("requests_per_minute"),
        requests_per_minute_total=value("requests_per_minute_total"),
    )


class Gate:
    """Counts requests in the last minute, per visitor and overall. Safe from any thread; memory stays bounded."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self._each, self._total = limits.requests_per_minute, limits.requests_per_minute_total
        self._clock = clock
        self._lock = threading.Lock()
        self._by_visitor: dict[str, deque[float]] = {}
        self._all: deque[float] = deque()

    def admit(self, visitor: str) -> None:
        """Let one request in and count it, or raise `Problem` with the seconds until the next is let in."""
        now = self._clock()
        with self._lock:
            mine = self._by_visitor.get(visitor) or deque()
            _forget(mine, now)
            _forget(self._all, now)
            if self._each is not None and len(mine) >= self._each:
                raise Problem(
                    f"You have started {len(mine)} comparisons in the last minute; the limit here is {self._each} "
                    "(COMPARATOR_REQUESTS_PER_MINUTE).",
                    f"Try again in {_wait_s(mine, now)} s.",
                )
            if self._total is not None and len(self._all) >= self._total:
                raise Problem(
                    f"This server has started {len(self._all)} comparisons in the last minute, for everybody together; "
                    f"its limit is {self._total} (COMPARATOR_REQUESTS_PER_MINUTE_TOTAL).",
                    f"Try again in {_wait_s(self._all, now)} s, or run Quant Comparator on your own machine.",
                )
            if self._each is not None:
                mine.append(now)
                self._by_visitor[visitor] = mine
                if len(self._by_visitor) > _MOST_VISITORS:
                    self._tidy(now)
            if self._total is not None:
                self._all.append(now)

    def _tidy(self, now: float) -> None:
        for key, times in list(self._by_visitor.items()):
            _forget(times, now)
            if not times:
                del self._by_visitor[key]
        # All of them within one minute: those whose last request is oldest are forgotten.
        for key in sorted(self._by_visitor, key=lambda k: self._by_visitor[k][-1])[: -_MOST_VISITORS // 2]:
            del self._by_visitor[key]


def visitor(headers: Mapping[str, str], client_host: str | None, settings: Settings) -> str:
    """Who is asking, for counting: an address, not a name. Never kept with a comparison.

    Behind a proxy (COMPARATOR_BEHIND_PROXY, on by default on a Space) it is the last public address that the proxies
    put into X-Forwarded-For: what a visitor writes there himself stands before it.
    """
    if settings.behind_proxy:
        for part in reversed(headers.get("x-forwarded-for", "").split(",")[-20:]):
            try:
                address = ipaddress.ip_address(part.strip())
            except ValueError:
                continue
            if address.is_global:
                # A household or a server has a whole /64 of IPv6, so that is one visitor.
                network = ipaddress.ip_network((address, 64 if address.version == 6 else 32), strict=False)
                return str(network.network_address)
    return client_host or "unknown"


def auth_pairs(settings: Settings) -> list[tuple[str, str]] | None:
    """COMPARATOR_AUTH as (user, password) pairs for the page's login, or None. Raises `Problem`, quoting no password.

    `user:password`, several with commas between; a password alone belongs to the user “user”.
    """
    text = settings.auth.get_secret_value().strip() if settings.auth is not None else ""
    if not text:
        return None
    pairs = []
    for part in text.split(","):
        user, colon, password = part.strip().partition(":")
        user, password = (user.strip(), password) if colon else ("user", user)
        if not user or not password:
            raise Problem(
                "COMPARATOR_AUTH has an entry without a user or without a password.",
                "Write user:password, several with commas between; a password cannot contain a comma.",
            )
        pairs.append((user, password))
    return pairs


def parse_count(text: str) -> int:
    """`135M`, `8B`, `1.5e9` → a number. Raises `Problem` on anything else."""
    found = re.fullmatch(
        r"\s*(\d[\d_]*(?:\.\d+)?(?:e\d{1,2})?)\s*([kmbt]?)\s*", text, re.IGNORECASE | re.ASCII
    )
    if not found:
        raise Problem(f"“{text}” is not a number of parameters.", "Write 135M, 8B or a whole number.")
    return math.floor(
        float(found[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}[found[2].lower()]
    )


def _is_path(text: str) -> bool:
    """Whether this would be taken for a file or folder here, by its form or because there is one."""
    if (
        text.startswith(("/", "~", ".", "\\"))
        or ".." in text
        or "\\" in text
        or text.lower().endswith(".gguf")
    ):
        return True
    try:
        return Path(text).exists() or Path(text.partition("@")[0]).exists()
    except (OSError, ValueError):
        return True


def _over(what: str, asked: int, most: int, setting: str, advice: str) -> Problem:
    return Problem(f"{asked:,} {what}: the limit here is {most:,} (COMPARATOR_{setting}).", advice)


def _forget(times: deque[float], now: float) -> None:
    while times and times[0] <= now - _WINDOW_S:
        times.popleft()


def _wait_s(times: deque[float], now: float) -> int:
    return max(1, math.ceil(times[0] + _WINDOW_S - now))


def _a(what: str) -> str:
    return f"an {what}" if what[0] in "aeiou" else f"a {what}"


def _count(number: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
