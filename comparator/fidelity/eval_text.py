"""The longer text that fidelity is measured on: where it comes from, and how it is cut into windows.

The bundled text was written for this project, so no model has been trained on
it and no calibration uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.core.request import EvalSettings
from comparator.util import formatting

SHIPPED = Path(__file__).parents[1] / "data" / "eval_text.txt"
WIKITEXT = "wikitext2"
# The plain text that llama.cpp's scripts fetch (scripts/get-wikitext-2.sh): one zip, no parquet reader needed.
_WIKITEXT_REPO, _WIKITEXT_FILE, _WIKITEXT_MEMBER = "ggml-org/ci", "wikitext-2-raw-v1.zip", "wiki.test.raw"
_SAMPLE = 65536  # bytes that are looked at to tell text from something else


@dataclass(frozen=True)
class Window:
    """One forward pass: input tokens `start` to `end`, of which the positions from `first` on are scored."""

    start: int
    end: int
    first: int

    @property
    def scored(self) -> slice:
        """The rows of this window's logits that count."""
        return slice(self.first - self.start, self.end - self.start)


def windows(count: int, context: int, stride: int) -> list[Window]:
    """Cut `count` tokens so that every position which has a next token is scored once.

    A window starts every `stride` tokens and has at most `context`; with stride < context its first
    context − stride positions are there as context only, having been scored by the window before. The last
    token has no next one: it is never an input.
    """
    last, found, done = count - 1, [], 0
    for start in range(0, last, stride):
        end = min(start + context, last)
        if end > done:
            found.append(Window(start, end, done))
            done = end
        if end == last:
            break
    return found


def _decoded(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "binary" if b"\0" in data[:_SAMPLE] else "not UTF-8"
        raise UserError(
            f"The evaluation text {name} is {kind} (byte {error.start:,}).",
            "Give a plain text file in UTF-8, a few thousand words of prose for instance.",
        ) from None
    check_text(text, name)
    return text


def check_text(text: str, name: str) -> None:
    """Raises `UserError` for a text that is empty or binary."""
    if not text.strip():
        raise UserError(
            f"The evaluation text {name} is empty.", "Give a text of at least one context length."
        )
    strange = sum(c in "\0\ufffd" or (ord(c) < 32 and c not in "\t\n\r\f") for c in text[:_SAMPLE])
    if "\0" in text or strange > len(text[:_SAMPLE]) / 20:
        raise UserError(
            f"The evaluation text {name} is binary.",
            "Give a plain text file in UTF-8, a few thousand words of prose for instance.",
        )


def check(given: EvalSettings, context_length: int | None = None) -> None:
    """Ranges, and the text where it is given. `context_length` is the model's, where it is known. Raises `UserError`."""
    for name in ("context", "stride"):
        value = getattr(given, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"The evaluation's {name} is {value}.", "Give a number of tokens, for example 512."
            )
    if given.context < 2:
        raise UserError(
            "The evaluation's context is 1 token.", "That is too short to predict anything from; use 512."
        )
    if given.stride > given.context:
        raise UserError(
            f"The evaluation's stride, {given.stride:,}, is longer than its context, {given.context:,}.",
            "Text between two windows would be left out: use a stride of at most the context.",
        )
    if context_length and given.context > context_length:
        raise UserError(
            f"The evaluation's context is {given.context:,} tokens; the model's is {context_length:,}.",
            f"Use a context of at most {context_length:,}.",
        )
    if given.text is not None:
        check_text(given.text, f"“{given.name}”")


def text_of(given: EvalSettings) -> str:
    """Raises `UserError` for WikiText-2 when the Hub cannot be reached."""
    if given.text is not None:
        return given.text
    return _wikitext() if given.name == WIKITEXT else shipped()


@cache
def shipped() -> str:
    """The text that comes with this project: some 2,600 words of English prose, dialogue, a recipe, code, minutes,
    a letter, news."""
    return SHIPPED.read_text(encoding="utf-8")


def encode(tokenizer: Any, given: EvalSettings) -> list[int]:
    """The text's token ids, with the special tokens this tokenizer puts before a text. Raises `UserError` for a text
    that is shorter than the context."""
    ids = list(tokenizer(text_of(given), add_special_tokens=True, verbose=False)["input_ids"])
    if len(ids) <= given.context:
        raise UserError(
            f"The evaluation text “{given.name}” has {len(ids):,} tokens; the context is {given.context:,}.",
            "Give a longer text" + (f", or a context of at most {len(ids) - 1:,}." if len(ids) > 2 else "."),
        )
    return ids


@cache
def _wikitext() -> str:
    """WikiText-2's test split from the Hub. Raises `UserError` when it cannot be had."""
    import zipfile

    def fetch() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(_WIKITEXT_REPO, _WIKITEXT_FILE, repo_type="dataset", etag_timeout=10)

    path = _from_hub(fetch)
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(n for n in archive.namelist() if n.endswith(_WIKITEXT_MEMBER))
            return _decoded(archive.read(member), WIKITEXT)
    except (zipfile.BadZipFile, StopIteration):
        raise UserError(
            f"The Hub's {_WIKITEXT_FILE} is not the expected archive.",
            "Remove it from the Hub cache and try again, or give a text file.",
        ) from None


def _from_hub(fetch: Callable[[], str], waits_s: Sequence[float] = (1.0,)) -> str:
    import time

    for wait in (*waits_s, None):
        try:
            return fetch()
        except Exception as error:  # requests', httpx's and the Hub's own, by version
            if wait is None or type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
                said = formatting.first_line(error, 160)
                raise UserError(
                    f"WikiText-2 cannot be fetched from the Hub: {said}",
                    "Check the connection, or omit --eval-text to use the bundled text.",
                ) from None
            time.sleep(wait)
    raise AssertionError("unreachable")
