"""Tokenizer, chat template and stop tokens of a checkpoint: do they fit the model and each other? Loads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comparator.core.errors import UserError
from comparator.sources.checkpoint import Checkpoint
from comparator.util import formatting


@dataclass(frozen=True)
class Check:
    """What was checked and found. `ok` is False for a problem."""

    subject: str
    ok: bool
    found: str


def check(checkpoint: Checkpoint) -> list[Check]:
    """Imports transformers. Runs the checkpoint's own chat template."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        return [Check("tokenizer", False, f"cannot be read: {formatting.first_line(error, 200)}")]
    checks = [_ids(tokenizer, checkpoint.vocab_size)]
    if not tokenizer.chat_template:
        return [*checks, Check("chat template", True, "none: prompts are sent as raw text")]
    try:
        rendered = _rendered(tokenizer)
    except UserError as problem:
        return [*checks, Check("chat template", False, problem.problem)]
    if (checkpoint.path / "generation_config.json").is_file():
        stops = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True).eos_token_id
    else:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
        stops = config.get_text_config().eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    return [*checks, _template(tokenizer, rendered), _stops(tokenizer, {s for s in stops if s is not None})]


def _ids(tokenizer: Any, rows: int | None) -> Check:
    """Whether every token has a row in the embedding."""
    vocabulary = tokenizer.get_vocab()
    outside = sorted((i, token) for token, i in vocabulary.items() if rows is not None and i >= rows)
    if outside:
        first = ", ".join(f"{token!r} ({i})" for i, token in outside[:3])
        return Check(
            "tokenizer",
            False,
            f"{len(outside)} tokens have no row in the embedding, which has {rows:,}: {first}",
        )
    special = {n: getattr(tokenizer, f"{n}_token") for n in ("bos", "eos", "pad")}
    named = ", ".join(f"{n} {t!r}" for n, t in special.items() if t)
    return Check(
        "tokenizer",
        True,
        f"{len(vocabulary):,} tokens, all within the embedding; {named or 'no special tokens'}",
    )


def _rendered(tokenizer: Any) -> str:
    """A user's question as the model gets it. Raises `UserError` where the template refuses it."""
    try:
        return _render(tokenizer, [("user", "Hello")], True)
    except Exception as error:
        raise UserError(f"rejects a user's message: {formatting.first_line(error, 200)}") from error


def _render(tokenizer: Any, turns: list[tuple[str, str]], question: bool) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=question, tokenize=False)


def _template(tokenizer: Any, rendered: str) -> Check:
    ids, bos = tokenizer(rendered, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    if "Hello" not in rendered:
        return Check("chat template", False, "ignores the user's message")
    if bos is not None and bos != tokenizer.eos_token_id and ids[:2] == [bos, bos]:
        return Check("chat template", False, f"writes two {tokenizer.bos_token!r} at the start")
    roles = []
    for role, turns in (
        ("system", [("system", "Marker"), ("user", "Hello")]),
        ("assistant", [("user", "Hello"), ("assistant", "Marker")]),
    ):
        try:
            roles += [role] if "Marker" in _render(tokenizer, turns, False) else []
        except Exception:  # jinja2's TemplateError, or whatever a template raises
            continue
    refused = [role for role in ("system", "assistant") if role not in roles]
    return Check(
        "chat template", True, f"renders; roles user, {', '.join(roles) or 'no other'}"
        + (f" (not {', '.join(refused)})" if refused else ""),
    )  # fmt: skip


def _stops(tokenizer: Any, stops: set[int]) -> Check:
    """Whether the token with which the template ends an assistant's turn ends an answer."""
    named = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in sorted(stops)) or "none"
    try:
        text = _render(tokenizer, [("user", "Hello"), ("assistant", "Marker")], False)
    except Exception:  # a template without this role: nothing to compare with
        return Check("stop tokens", True, named)
    after = tokenizer(text.rpartition("Marker")[2], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    end = next((i for i in after if i in special), None)
    if end is None or end in stops:
        return Check("stop tokens", True, named)
    token = tokenizer.convert_ids_to_tokens(end)
    return Check(
        "stop tokens", False, f"a turn ends with {token!r} ({end}), which generation_config.json does not list ({named}): "
        "answers will run on",
    )  # fmt: skip
