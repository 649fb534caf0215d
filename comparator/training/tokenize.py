"""Samples → token ids and labels, exactly what the collator pads and the model sees.

Chat messages and prompts go through the model's own chat template. The prompt is tokenized alone, as for generation; the
tokens to train on begin after it.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comparator.core.errors import UserError
from comparator.decoding import chat_template
from comparator.sources import isolated
from comparator.training.data import Data
from comparator.training.settings import TrainSettings
from comparator.training.types import DataPreview, Piece, SamplePreview, TokenStatistics

MASKED = -100
_CPU_S = 60  # what a stranger's tokenizer may compute for a whole data set
_WALL_S = 300.0  # and its chat template beside it
Progress = Callable[[float | None, str], None]


@dataclass(frozen=True)
class Encoded:
    """One sample. `labels`: the ids of the tokens in the loss, −100 elsewhere; `full`: tokens before truncation."""

    row: int
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    full: int

    @property
    def trained_tokens(self) -> int:
        """Tokens in the loss; the first token of a sample is never predicted."""
        return sum(label != MASKED for label in self.labels[1:])


@dataclass(frozen=True)
class Corpus:
    """The encoded samples, split. `skipped`: (row, reason)."""

    train: tuple[Encoded, ...]
    heldout: tuple[Encoded, ...]
    skipped: tuple[tuple[int, str], ...]
    notes: tuple[str, ...]

    @property
    def all(self) -> tuple[Encoded, ...]:
        return tuple(sorted((*self.train, *self.heldout), key=lambda e: e.row))


def load_tokenizer(checkpoint: Any) -> Any:
    """A tokenizer of the model separate from the engine's, so that a preview is not queued. Raises `UserError`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a dataloader may fork
    from comparator.sources import tokenizer

    return tokenizer.load_tokenizer(checkpoint, _CPU_S, isolated.beside)


# ---------------------------------------------------------------- one sample


def segments(
    sample: dict[str, Any], tokenizer: Any, system: str | None = None, completion_only: bool = True
) -> list[tuple[str, bool]]:
    """The whole sample as (text, whether it is trained on) pieces. Raises `UserError` where a template refuses it."""
    if "text" in sample:
        return [(_ended(sample["text"], tokenizer), True)]
    templated = bool(getattr(tokenizer, "chat_template", None))
    if "messages" in sample:
        messages = sample["messages"]
    else:
        prompt, completion = sample["prompt"], sample["completion"]
        if isinstance(prompt, str) and isinstance(completion, str) and not templated:
            lead = f"{system}\n\n" if system else ""
            return [(lead + prompt, not completion_only), (_ended(completion, tokenizer), True)]
        messages = [
            *(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]),
            *(completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]),
        ]
    if not templated:
        raise UserError(
            "The data are chat messages and this model has no chat template.",
            "Use prompt and completion columns or plain text, or an instruct model.",
        )
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if "messages" not in sample:  # a completion of several messages is one answer to the prompt
        first = len(messages) - (len(sample["completion"]) if isinstance(sample["completion"], list) else 1)
        indices = range(first, len(messages))
    else:
        indices = range(len(messages))
    return _turns(messages, indices, tokenizer, completion_only)


def _turns(
    messages: list[dict], indices: range, tokenizer: Any, completion_only: bool
) -> list[tuple[str, bool]]:
    full_text = chat_template.written(tokenizer, messages, False)
    if not completion_only:
        return [(full_text, True)]
    end_of_turn = tokenizer.eos_token or ""
    pieces: list[tuple[str, bool]] = []
    end_of_last = 0
    for index in indices:
        if messages[index]["role"] != "assistant":
            continue
        before = chat_template.written(tokenizer, messages[:index], True) if index else ""
        last = index == len(messages) - 1
        through = full_text if last else chat_template.written(tokenizer, messages[: index + 1], False)
        if not full_text.startswith(through):
            continue  # the template formats this turn differently once others follow: it is context only
        if not full_text.startswith(before):
            before = os.path.commonprefix([before, full_text])
        start, end = max(len(before), end_of_last), len(through)
        if end_of_turn and end_of_turn in full_text[start:end]:
            # What the template appends after the end of a turn is never generated.
            end = full_text.rindex(end_of_turn, start, end) + len(end_of_turn)
        pieces += [(full_text[end_of_last:start], False), (full_text[start:end], True)]
        end_of_last = end
    remainder = full_text[end_of_last:]
    if remainder.strip() or not pieces:
        pieces.append((remainder, False))
    return [(text, trained) for text, trained in pieces if text]


def _ended(text: str, tokenizer: Any) -> str:
    eos = tokenizer.eos_token or ""
    return text if eos and text.endswith(eos) else text + eos


def encode_sample(
    sample: dict[str, Any], tokenizer: Any, settings: TrainSettings, system: str | None
) -> Encoded:
    """One sample's ids and labels, truncated to the maximum length."""
    ids: list[int] = []
    labels: list[int] = []
    plain = "text" in sample or not getattr(tokenizer, "chat_template", None)
    for number, (text, trained) in enumerate(segments(sample, tokenizer, system, settings.completion_only)):
        piece = tokenizer(text, add_special_tokens=plain and number == 0, verbose=False)["input_ids"]
        if plain and number == 0 and len(piece) > 1 and piece[-1] == piece[-2] == tokenizer.eos_token_id:
            piece = piece[:-1]  # this tokenizer appends the end token itself
        ids += piece
        labels += piece if trained else [MASKED] * len(piece)
    cut = slice(None, settings.max_length)
    return Encoded(sample["row"], tuple(ids[cut]), tuple(labels[cut]), len(ids))


# ---------------------------------------------------------------- all of them


def encode(
    data: Data,
    tokenizer: Any,
    settings: TrainSettings,
    system: str | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Every sample, split into training and held-out ones. Raises `UserError` if no token is left to train on."""
    encoded, skipped = [], list(data.skipped)
    reasons: dict[str, int] = {}
    strangers, began_s = isinstance(tokenizer, isolated.IsolatedTokenizer), time.monotonic()
    for number, sample in enumerate(data.samples):
        if (
            strangers and time.monotonic() - began_s > _WALL_S
        ):  # each sample alone is within a template's limits
            raise UserError(
                f"{data.title} takes longer than {_WALL_S:g} s to tokenize with this model.",
                "Take a part of the data, or choose another model.",
            )
        sample_ids = encode_sample(sample, tokenizer, settings, system)
        if sample_ids.trained_tokens:
            encoded.append(sample_ids)
        else:
            cut = sample_ids.full > settings.max_length
            why = (
                f"its prompt alone fills the {settings.max_length:,} tokens"
                if cut
                else "it has no answer to train on"
            )
            reasons[why] = reasons.get(why, 0) + 1
            skipped.append((sample["row"], why))
        if progress and number % 200 == 199:
            progress((number + 1) / len(data.samples), f"reading {data.title}")
    if not encoded:
        why = max(reasons, key=reasons.__getitem__)
        raise UserError(
            f"{data.title} contains nothing to train on: all {len(data.samples):,} samples are masked ({why}).",
            "Raise the maximum length, or shorten the prompts."
            if "fills" in why
            else "Chat data needs answers with the role assistant; or turn off “Completion only”.",
        )
    train, heldout = _split(encoded, settings)
    notes = list(data.notes)
    if skipped:
        notes.append(f"{len(skipped):,} of {len(data.samples) + len(data.skipped):,} rows were skipped.")
    if data.form == "text" and settings.completion_only:
        notes.append("Plain text has no prompt, so the loss covers all of it.")
    return Corpus(tuple(train), tuple(heldout), tuple(sorted(skipped)), tuple(notes))


def _split(samples: list[Encoded], settings: TrainSettings) -> tuple[list[Encoded], list[Encoded]]:
    """(training, held-out) samples. Depends on the seed alone, so that a repeated run holds out the same rows."""
    count = round(len(samples) * settings.held_back)
    if settings.held_back and len(samples) > 1:
        count = min(max(1, count), len(samples) - 1)
    elif len(samples) == 1:
        count = 0
    chosen = set(random.Random(settings.seed).sample(range(len(samples)), count))
    heldout = [e for i, e in enumerate(samples) if i in chosen]
    return [e for i, e in enumerate(samples) if i not in chosen], heldout


def preview(
    data: Data, corpus: Corpus, tokenizer: Any, settings: TrainSettings, samples: int = 5
) -> DataPreview:
    """What is shown before training: `samples` samples spread over the data, and statistics of all."""
    encoded = corpus.all
    step = max(1, len(encoded) // max(1, samples))
    chosen = encoded[::step][:samples]
    masking = {
        "text": "Nothing is masked: the loss covers all of the text.",
        "chat": "Grey is masked: the loss covers only the assistant's answers.",
        "prompt": "Grey is masked: the loss covers only the completions.",
    }[data.form]
    if not settings.completion_only:
        masking = "Nothing is masked: the loss covers the prompts too."
    long = sorted(((e.row, e.full) for e in encoded if e.full > settings.max_length), key=lambda x: -x[1])
    return DataPreview(
        title=data.title,
        form=data.form,
        columns=data.columns,
        other_columns=data.other_columns,
        rows=len(data.samples) + len(data.skipped),
        train_rows=len(corpus.train),
        eval_rows=len(corpus.heldout),
        fingerprint=data.fingerprint,
        samples=tuple(_sample_preview(e, tokenizer) for e in chosen),
        tokens=_statistics(encoded, settings, len(corpus.skipped)),
        long=tuple(long[:20]),
        skipped=corpus.skipped[:20],
        notes=corpus.notes,
        masking=masking,
    )


def _sample_preview(encoded: Encoded, tokenizer: Any) -> SamplePreview:
    pieces: list[Piece] = []
    start = 0
    flags = [label != MASKED for label in encoded.labels]
    for end in range(1, len(flags) + 1):
        if end == len(flags) or flags[end] != flags[start]:
            text = tokenizer.decode(list(encoded.ids[start:end]), clean_up_tokenization_spaces=False)
            pieces.append(Piece(text, flags[start], end - start))
            start = end
    return SamplePreview(
        encoded.row, tuple(pieces), len(encoded.ids), encoded.trained_tokens, encoded.full - len(encoded.ids)
    )


def _statistics(encoded: tuple[Encoded, ...], settings: TrainSettings, left_out: int) -> TokenStatistics:
    lengths = sorted(e.full for e in encoded)
    bound, histogram = 16, []
    while True:
        lower = histogram[-1][0] if histogram else 0
        histogram.append((bound, sum(lower < n <= bound for n in lengths)))
        if bound >= lengths[-1]:
            break
        bound *= 2
    return TokenStatistics(
        rows=len(encoded),
        total=sum(lengths),
        trained_tokens=sum(e.trained_tokens for e in encoded),
        minimum=lengths[0],
        median=int(statistics.median(lengths)),
        mean=statistics.fmean(lengths),
        p95=lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))],
        maximum=lengths[-1],
        over_length=sum(n > settings.max_length for n in lengths),
        cut_tokens=sum(max(0, n - settings.max_length) for n in lengths),
        left_out=left_out,
        histogram=tuple(histogram),
    )
