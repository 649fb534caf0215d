"""What form of a request one server understands, and what it says of itself: found out once, with a prompt of two words.

Servers differ in what they take. The best form is token ids, which are the very prompt of the other columns; then the
rendered text; then messages, which the server puts into its own chat template.
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from comparator.core.errors import Stopped, UserError
from comparator.core.messages import Prompt
from comparator.core.request import GenerationSettings
from comparator.runtimes.endpoint.problems import Refused, named
from comparator.runtimes.endpoint.reading import Answer

if TYPE_CHECKING:
    from comparator.runtimes.endpoint.client import Client

Form = Literal["ids", "text", "chat"]
FORMS: tuple[Form, ...] = ("ids", "text", "chat")
WORDS: dict[Form, str] = {"ids": "token ids", "text": "rendered text", "chat": "messages"}
NOTES: dict[Form, str] = {
    "ids": "The server was sent the token ids of the prompt, like every other variant.",
    "text": "The server accepts no token ids: it was sent the rendered prompt as text and tokenized it itself.",
    "chat": (
        "The server accepts neither token ids nor rendered text: it was sent the messages and applied its own chat "
        "template, so its prompt may differ from that of the other variants."
    ),
}
PROBE = "Hello there"


@dataclass(frozen=True)
class Dialect:
    """How to write a request to one server. `extras`: it takes fields beyond OpenAI's own."""

    model: str
    form: Form
    extras: bool
    adds_bos: bool = (
        False  # a tokenizer like this model's puts the beginning-of-sequence token before any text
    )
    bos: str = ""

    def body(self, prompt: Prompt, settings: GenerationSettings, fresh: bool = True) -> dict[str, Any]:
        """A request for an answer. fresh: the server shall not use what it computed for an earlier request, where it can
        be told. Raises `UserError` for settings that it cannot be given."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            **self._prompt(prompt),
        }
        if settings.temperature > 0:
            body |= {"top_p": settings.top_p, "seed": settings.seed & (2**31 - 1)}
        if not self.extras:
            if settings.top_k or settings.repetition_penalty != 1:
                raise UserError(
                    "This server supports neither top-k nor a repetition penalty.",
                    "Use top-k 0 and a repetition penalty of 1, or remove this variant.",
                )
            return body
        body |= {
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "top_k": settings.top_k or -1,  # off; SGLang refuses 0
            "min_p": 0.0,
            "repetition_penalty": settings.repetition_penalty,
            "repeat_penalty": settings.repetition_penalty,
        }
        # So that the time to the first token is that of the whole prompt: llama-server's field, then vLLM's.
        return body | ({"cache_prompt": False, "cache_salt": secrets.token_hex(16)} if fresh else {})

    def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        if not prompt.token_ids:  # tokenized by nobody: a request for a server's own model and template
            return {"messages": [{"role": role, "content": content} for role, content in prompt.messages]}
        if self.form == "ids":
            return {"prompt": list(prompt.token_ids)}
        if self.form == "text":
            return {"prompt": prompt.text.removeprefix(self.bos) if self.adds_bos else prompt.text}
        return {"messages": [{"role": role, "content": content} for role, content in prompt.messages]}


@dataclass(frozen=True)
class Facts:
    """What a server says of itself. `name`: "vLLM 0.11.2"; `details`: "quantization Q4_1"."""

    name: str = "OpenAI-compatible server"
    version: str | None = None
    details: tuple[str, ...] = field(default_factory=tuple)

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}" if self.version else self.name


def listed(client: Client, cancel: threading.Event) -> list[dict[str, Any]]:
    """The server's models; [] where it cannot list them and one is named (`transformers serve` lists a folder that need
    not exist)."""
    try:
        return client.models(cancel)
    except Refused:
        if client.endpoint.model:
            return []
        raise


def model_of(client: Client, entries: list[dict[str, Any]]) -> str:
    """The model to ask for: the named one, or the only one there is. Raises `UserError`."""
    ids = [entry["id"] for entry in entries]
    wanted = client.endpoint.model
    if wanted:
        return wanted
    if len(ids) == 1:
        return ids[0]
    listed = f"It has {', '.join(ids[:8])}{' …' if len(ids) > 8 else ''}." if ids else "It lists none."
    raise UserError(
        f"{named(client.endpoint)} has {len(ids)} models, and none is named.",
        f"Name one after a #: http://host:8000/v1#model. {listed}",
    )


def served(entries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What tells a server's models from others: their ids and whose they are."""
    return sorted((entry["id"], str(entry.get("owned_by"))) for entry in entries)


def find(client: Client, model: str, tokenizer: Any, cancel: threading.Event) -> Dialect:
    """Try the forms, the best first. Raises what the server says to the last of them.

    A form is understood where the server counts as many prompt tokens as we do, or does not say: a server may put a text
    into its chat template once more.
    """
    from comparator.decoding.text import encode

    probe = encode(tokenizer, PROBE, None, None)
    bos = tokenizer.bos_token or ""
    adds_bos = bool(bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    settings = GenerationSettings(max_new_tokens=1)
    near: list[tuple[int, Dialect]] = []
    problem: UserError | None = None
    for form in FORMS:
        for extras in (True, False):
            dialect = Dialect(model, form, extras, adds_bos, bos)
            answer = Answer(tokenizer)
            try:
                for at_s, piece in client.stream(dialect.body(probe, settings), cancel):
                    answer.add(at_s, piece)
            except Refused as refused:
                problem = refused
                continue
            if cancel.is_set():
                raise Stopped
            answer.require_end(client.endpoint)
            counted = answer.prompt_tokens
            if counted in (None, len(probe.token_ids)):
                return dialect
            near.append((abs(counted - len(probe.token_ids)), dialect))
            break
    if near:
        return min(near, key=lambda pair: pair[0])[1]
    assert problem is not None
    raise problem


def ask_about(client: Client, model: str, entries: list[dict[str, Any]], cancel: threading.Event) -> Facts:
    """What the server says of itself, as far as it is one of those whose way of saying it is known."""
    entry = next((e for e in entries if e["id"] == model), entries[0] if entries else {})
    owner = str(entry.get("owned_by") or "").lower()
    if owner == "vllm":
        version = client.aside("/version", cancel).get("version")
        return Facts("vLLM", _text(version), _listed(("max_model_len", "context"), of=entry))
    if owner == "llamacpp":
        props = client.aside("/props", cancel)
        meta = entry.get("meta") if isinstance(entry.get("meta"), dict) else {}
        known = {"quantization": props.get("model_ftype") or meta.get("ftype"), "n_ctx": meta.get("n_ctx")}
        return Facts(
            "llama.cpp",
            _text(props.get("build_info")),
            _listed("quantization", ("n_ctx", "context"), of=known),
        )
    if owner == "library":  # Ollama's
        version = client.aside("/api/version", cancel).get("version")
        shown = client.aside("/api/show", cancel, {"model": model}).get("details")
        known = shown if isinstance(shown, dict) else {}
        return Facts("Ollama", _text(version), _listed(("quantization_level", "quantization"), of=known))
    return Facts(owner) if owner and owner.isprintable() and len(owner) < 40 else Facts()


def _listed(*keys: str | tuple[str, str], of: dict[str, Any]) -> tuple[str, ...]:
    """("quantization Q4_1", …) for the keys that are there; (key, word) where the word is another."""
    pairs = [(k, k) if isinstance(k, str) else k for k in keys]
    return tuple(f"{word} {_text(of[key])}" for key, word in pairs if _text(of.get(key)))


def _text(value: Any) -> str | None:
    text = str(value).strip() if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    return text[:60] if text and text.isprintable() else None
