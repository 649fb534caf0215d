"""What one visitor may ask for, and how often. Each refusal names the limit and says what to do about it.

    limits = limits_of(settings)
    limits.check(request, prompt_tokens=…, facts=…)   # pure; call it again when more is known
    visitor(headers, client_host, settings)       # who asks; `rate_limit.RateLimiter` counts them

On a private installation only the settings that were set apply, and local paths are allowed. In public mode every
limit has a value, and models come from the Hub or are built in, never from a path. COMPARATOR_ALLOWED_MODELS is
read here and nowhere else: the page, the command line, training and the engines all call `check_source`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from comparator.backends import source_kind
from comparator.core.endpoints import parse_endpoints
from comparator.core.errors import UserError
from comparator.core.request import Request
from comparator.core.settings import Settings, get_settings, parse_bytes, parse_count
from comparator.core.state import ModelFacts
from comparator.core.variant import Adapter, Cell
from comparator.sources import builtin_names

# The limits of public mode where the setting is not given; docs/space.md lists them.
PUBLIC = {
    "requests_per_minute": 6,
    "requests_per_minute_total": 60,
    "max_tokens_per_comparison": 8_192,
    "max_evaluation_characters": 50_000,
    "max_model_parameters": "9B",
    "max_evaluation_tokens": 200_000,
    "max_comparison_s": 600,
    "max_wait_s": 1_800,
    "max_training_s": 600,
    "max_training_characters": 1_000_000,
    "max_stored": 5_000_000_000,
    "max_adapters": 5,
    "max_adapters_total": 100,
}
_CHARACTERS_PER_TOKEN = 20  # a prompt with more is refused before it is tokenized
BUNDLED_BYTES = 14_000  # of the text that is shipped (comparator/data/eval_text.txt)
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
    max_evaluation_tokens: int | None = None  # columns × windows × context
    max_comparison_s: int | None = None  # on the device
    max_wait_s: int | None = None  # in the queue
    max_training_s: int | None = None  # a visitor's, on the device
    max_training_characters: int | None = None  # of a visitor's data
    max_stored: int | None = None  # of saved comparisons
    max_adapters: int | None = None  # of one visitor, unfinished trainings included
    max_adapters_total: int | None = None  # of all visitors
    max_model_parameters: int | None = None
    allowed_models: tuple[str, ...] = ()  # patterns, see `allows`; empty: every model
    endpoints: tuple[str, ...] = ()  # names of the servers that the operator listed
    requests_per_minute: int | None = None  # per visitor
    requests_per_minute_total: int | None = None

    def check(
        self, request: Request, *, prompt_tokens: int | None = None, facts: ModelFacts | None = None
    ) -> None:
        """Raises `UserError` naming the first limit that the request exceeds. Arguments that are None are not checked."""
        self.check_sources(request)
        columns, settings = len(request.cells), request.settings
        runs = max(1, settings.repeats) * (
            2 if settings.decode == "both" else 1
        )  # "both" decodes eagerly too
        prompts = request.prompts.prompts if request.prompts else ()
        passes = runs + sum(1 + p.own_turns for p in prompts)
        comparison = f"({columns} columns × {settings.max_new_tokens} new tokens × {passes} runs)"
        text = request.evaluation.text if request.fidelity == "text" else None
        parts = (request.prompt, request.system or "", *request.template.variables.values())
        characters = max(sum(len(str(part)) for part in parts), *(p.characters for p in prompts), 0)
        shorter, part = "Shorten the prompt.", "Use a part of it."
        # (what is counted, how many, the limit, its setting, advice); None where there is nothing to count or no limit
        counts = (
            ("columns", columns, self.max_columns, "MAX_COLUMNS", "Deselect some variants or adapters."),
            ("new tokens", settings.max_new_tokens, self.max_new_tokens, "MAX_NEW_TOKENS", "Request a shorter answer."),
            (f"tokens in one comparison {comparison}", columns * settings.max_new_tokens * passes,
             self.max_tokens_per_comparison, "MAX_TOKENS_PER_COMPARISON",
             "Choose fewer columns, fewer repeats or a shorter answer."),
            ("characters in the prompt", characters,
             self.max_prompt_tokens * _CHARACTERS_PER_TOKEN, "MAX_PROMPT_TOKENS", shorter),
            ("prompt tokens", prompt_tokens, self.max_prompt_tokens, "MAX_PROMPT_TOKENS", shorter),
            ("characters in the text that fidelity is measured on", None if text is None else len(text),
             self.max_evaluation_characters, "MAX_EVALUATION_CHARACTERS", part),
            ("tokens (about) in the prompts of the set, over all columns",
             columns * sum(p.characters for p in prompts) // 4 if prompts else None,
             self.max_evaluation_tokens, "MAX_EVALUATION_TOKENS", "Use fewer or shorter prompts."),
            ("tokens (about) to measure fidelity on, with overlaps and over all columns", _evaluation_tokens(request),
             self.max_evaluation_tokens, "MAX_EVALUATION_TOKENS", "Choose a larger stride or a shorter text."),
        )  # fmt: skip
        for count in counts:
            _within(*count)
        if facts is not None:
            self.check_size(facts)

    def check_sweep(self, read: int, decoded: int, new_tokens: int) -> None:
        """Raises `UserError` for a sweep of too much work. read, decoded: tokens of all its points; new_tokens: of a sequence."""
        advice = "Choose fewer variants, smaller batches or shorter contexts."
        _within(
            "tokens of prompts to read", read, self.max_evaluation_tokens, "MAX_EVALUATION_TOKENS", advice
        )
        _within(
            "tokens to decode", decoded, self.max_tokens_per_comparison, "MAX_TOKENS_PER_COMPARISON", advice
        )
        _within("new tokens", new_tokens, self.max_new_tokens, "MAX_NEW_TOKENS", "Request fewer new tokens.")

    def check_characters(self, count: int) -> None:
        """Raises `UserError` if a prompt of so many characters has more than the limit of tokens in any case."""
        most = self.max_prompt_tokens * _CHARACTERS_PER_TOKEN
        _within("characters in the prompt", count, most, "MAX_PROMPT_TOKENS", "Shorten the prompt.")

    def check_size(self, facts: ModelFacts) -> None:
        """Raises `UserError` if the model has more parameters than are allowed here."""
        most = self.max_model_parameters
        if self.public and most is not None and facts.parameters is None:
            raise UserError(
                f"It is not known how many parameters {facts.source} has; this server accepts models of up to "
                f"{_count(most)} "
                "(COMPARATOR_MAX_MODEL_PARAMETERS).",
                "Choose one in safetensors, whose size the Hub knows, or run Quant Comparator on your own machine.",
            )
        if most is not None and facts.parameters is not None and facts.parameters > most:
            raise UserError(
                f"{facts.source} has {_count(facts.parameters)} parameters; this server accepts models of up to "
                f"{_count(most)} (COMPARATOR_MAX_MODEL_PARAMETERS).",
                "Choose a smaller model, or run Quant Comparator on your own machine.",
            )

    def check_sources(self, request: Request) -> None:
        """Raises `UserError` for a path in public mode, and for a source that is not on the allow-list."""
        self.check_source(request.model, "model")
        for cell in request.cells:
            self.check_cell(cell)
        if self.public and request.max_memory:
            raise UserError("Memory limits are set by the server here.", "Leave the memory setting empty.")

    def check_cell(self, cell: Cell) -> None:
        """`check_source` for a column's checkpoint and adapter; in public mode no option may name a file."""
        if cell.variant.source:
            self.check_source(_named(cell.variant.source, cell.variant.revision), source_kind(cell.variant))
        for option, value in cell.variant.options:
            if self.public and value is not None and _is_path(value):
                raise UserError(
                    f"“{option}={value[:100]}” names a file, and a public server does not open its files for visitors.",
                    "Leave the option out, or run Quant Comparator on your own machine.",
                )
        if cell.adapter is not None:
            self.check_adapter(cell.adapter)

    def check_adapter(self, adapter: Adapter) -> None:
        self.check_source(_named(adapter.source, adapter.revision), "adapter")

    def check_source(self, name: str, what: str = "model") -> None:
        """Raises `UserError` if a model, checkpoint, adapter (with `@revision`) or endpoint of this name is not allowed here."""
        if what == "endpoint":
            return self._check_endpoint(name)
        if _is_builtin(name, what):
            return
        if self.public and (not _HUB_NAME.fullmatch(name) or ".." in name or _is_path(name)):
            raise UserError(
                f"“{name[:100]}” is not accepted as {_a(what)}: on a public server a {what} is built in or comes from the "
                "Hub, not from a path.",
                "Write user/name, or run Quant Comparator on your own machine to use local files.",
            )
        if not self.allows(name):
            raise UserError(
                f"“{name[:100]}” is not on this server's list (COMPARATOR_ALLOWED_MODELS).",
                f"It accepts {', '.join(self.allowed_models[:8])}{' …' if len(self.allowed_models) > 8 else ''}.",
            )

    def _check_endpoint(self, name: str) -> None:
        """Raises `UserError` for a server that the operator did not list, where visitors may not name their own: it is
        this machine that would open the connection."""
        if name in self.endpoints or not (self.public or self.allowed_models):
            return
        there = f"It has {', '.join(self.endpoints)}." if self.endpoints else "It has none."
        raise UserError(
            f"“{name[:100]}” is not an endpoint of this server (COMPARATOR_ENDPOINTS).",
            f"{there} Run Quant Comparator on your own machine to use another one.",
        )

    def allows(self, name: str) -> bool:
        """Whether the allow-list has this model, checkpoint or adapter. Built-in names need no entry.

        A pattern is `owner/name` or `owner/name@revision`; `*`, `?` and `[…]` match as in `fnmatch`, upper and lower
        case alike in the name. Without a revision the pattern covers every branch and tag of the repository, but no
        other ref: anybody can open a pull request (`refs/pr/4`) with weights of their own, and the Hub gives its commits
        by their hash too. A name without a revision means the branch `main`.
        """
        if not self.allowed_models:
            return True
        name = name.strip()
        repo, revision = (name, "") if _looks_local(name) else name.partition("@")[::2]
        for pattern in self.allowed_models:
            allowed_repo, at, allowed_revision = pattern.partition("@")
            if not fnmatchcase(repo.lower(), allowed_repo.lower()):
                continue
            if fnmatchcase(revision or "main", allowed_revision) if at else not _is_foreign_ref(revision):
                return True
        return False


def check_source(name: str, what: str = "model") -> None:
    """`Limits.check_source` with the settings of this process."""
    limits_of(get_settings()).check_source(name, what)


def limits_of(settings: Settings) -> Limits:
    """The limits that apply with these settings. Raises `UserError` naming a setting that cannot be read."""

    def value(name: str):
        configured = getattr(settings, name)
        return PUBLIC[name] if configured is None and settings.public else configured

    parameters = value("max_model_parameters")
    return Limits(
        public=settings.public,
        max_columns=settings.max_columns,
        max_new_tokens=settings.max_new_tokens,
        max_prompt_tokens=settings.max_prompt_tokens,
        max_tokens_per_comparison=value("max_tokens_per_comparison"),
        max_evaluation_characters=value("max_evaluation_characters"),
        max_evaluation_tokens=value("max_evaluation_tokens"),
        max_comparison_s=value("max_comparison_s"),
        max_wait_s=value("max_wait_s"),
        max_training_s=value("max_training_s"),
        max_training_characters=value("max_training_characters"),
        max_stored=None if value("max_stored") is None else parse_bytes(str(value("max_stored"))),
        max_adapters=value("max_adapters"),
        max_adapters_total=value("max_adapters_total"),
        max_model_parameters=None if parameters is None else parse_count(parameters),
        allowed_models=tuple(filter(None, (m.strip() for m in settings.allowed_models.split(",")))),
        endpoints=tuple(parse_endpoints(settings.endpoints)),
        requests_per_minute=value("requests_per_minute"),
        requests_per_minute_total=value("requests_per_minute_total"),
    )


def visitor(headers: Mapping[str, str], client_host: str | None, settings: Settings) -> str:
    """Who is asking, for rate limits: an address, not a name. Never saved with a comparison.

    Behind a proxy (COMPARATOR_BEHIND_PROXY, on by default on a Space) it is the last public address that the proxies
    put into X-Forwarded-For: what visitors write there themselves stands before it.
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


def _evaluation_tokens(request: Request) -> int | None:
    """About how many tokens the models read for fidelity on a text: a stride of 1 reads a whole window for each token."""
    if request.fidelity != "text":
        return None
    given = request.evaluation
    count = (len(given.text.encode("utf-8", "replace")) if given.text is not None else BUNDLED_BYTES) // 4
    windows = 1 + max(0, count - given.context) // max(1, given.stride)
    return len(request.cells) * windows * min(max(1, given.context), count)


def auth_pairs(settings: Settings) -> list[tuple[str, str]] | None:
    """COMPARATOR_AUTH as (user, password) pairs for the page's login, or None. Raises `UserError`, quoting no password.

    `user:password`, several separated by commas; a password alone belongs to the user “user”.
    """
    text = settings.auth.get_secret_value().strip() if settings.auth is not None else ""
    if not text:
        return None
    pairs = []
    for part in text.split(","):
        user, colon, password = part.strip().partition(":")
        user, password = (user.strip(), password) if colon else ("user", user)
        if not user or not password:
            raise UserError(
                "COMPARATOR_AUTH has an entry without a user or without a password.",
                "Write user:password, several separated by commas; a password cannot contain a comma.",
            )
        pairs.append((user, password))
    return pairs


def _within(what: str, count: int | None, most: int | None, setting: str, advice: str) -> None:
    if count is not None and most is not None and count > most:
        raise UserError(f"{count:,} {what}: the limit here is {most:,} (COMPARATOR_{setting}).", advice)


def _named(source: str, revision: str | None) -> str:
    return f"{source}@{revision}" if revision else source


def _is_builtin(name: str, what: str) -> bool:
    """An adapter's name without an owner is built in or trained here: on the Hub every adapter has an owner."""
    if what == "adapter" and re.fullmatch(r"[a-z0-9-]+", name) and not _is_path(name):
        return True
    return name.strip().lower() in builtin_names()


def _is_foreign_ref(revision: str) -> bool:
    """A ref that is neither a branch nor a tag: a pull request, what the Hub itself converted, or a commit, which may be of
    a pull request."""
    if re.fullmatch(r"[0-9a-f]{7,64}", revision.lower()) or {"", "."} & set(revision.split("/")) and revision:
        return True
    return revision.lower().startswith("refs/") and not revision.startswith(("refs/heads/", "refs/tags/"))


def _looks_local(text: str) -> bool:
    return text.startswith(("/", "~", ".", "\\")) or "\\" in text or text.lower().endswith(".gguf")


def _is_path(text: str) -> bool:
    """Whether this would be opened as a file or folder here, by its form or because there is one."""
    if _looks_local(text) or ".." in text:
        return True
    try:
        return Path(text).exists() or Path(text.partition("@")[0]).exists()
    except (OSError, ValueError):
        return True


def _a(what: str) -> str:
    return f"an {what}" if what[0] in "aeiou" else f"a {what}"


def _count(number: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
