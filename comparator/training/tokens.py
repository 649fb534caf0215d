"""Samples → token ids and labels, exactly what the collator pads and the model sees. Knows no torch.

Chat messages and prompts go through the model's own chat template. The prompt's ids are those of the prompt alone, as
they are when the model is asked; what is learnt begins after them.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comparator.training.data import Data
from comparator.training.settings import TrainSettings
from comparator.training.types import DataPreview, Piece, SamplePreview, TokenStatistics
from comparator.types import Problem

MASKED = -100
Progress = Callable[[float | None, str], None]


@dataclass(frozen=True)
class Encoded:
    """One sample. `labels` are the ids where there is a loss and −100 elsewhere; `full` is its length before cutting."""

    row: int
    ids: tuple[int, ...]
    labels: tuple[int, ...]
    full: int

    @property
    def learnt(self) -> int:
        """Tokens in the loss; the very first token is never predicted."""
        return sum(label != MASKED for label in self.labels[1:])


@dataclass(frozen=True)
class Corpus:
    """All that is trained and evaluated on. `skipped`: (row, why)."""

    train: tuple[Encoded, ...]
    held: tuple[Encoded, ...]
    skipped: tuple[tuple[int, str], ...]
    notes: tuple[str, ...]

    @property
    def all(self) -> tuple[Encoded, ...]:
        return tuple(sorted((*self.train, *self.held), key=lambda e: e.row))


def load_tokenizer(checkpoint: Any) -> Any:
    """The model's tokenizer, apart from the engine's, so that a preview waits for no turn."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a dataloader may fork
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(checkpoint.path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise Problem(
            f"The tokenizer of {checkpoint.source} cannot be read: {str(error).splitlines()[0][:200]}",
            "Check that the folder holds tokenizer.json or the files of a slow tokenizer.",
        ) from error


# ---------------------------------------------------------------- one sample


def segments(
    sample: dict[str, Any], tokenizer: Any, system: str | None = None, completion_only: bool = True
) -> list[tuple[str, bool]]:
    """(text, whether it is learnt) pieces that join to the whole sample. Raises `Problem` where a template refuses."""
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
        raise Problem(
            "The data are chat messages and this model has no chat template.",
            "Use prompt and completion columns or plain text, or an instruct model.",
        )
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if "messages" not in sample:  # a completion of several messages is one answer to the prompt
        first = len(messages) - (len(sample["completion"]) if isinstance(sample["completion"], list) else 1)
        turns = range(first, len(messages))
    else:
        turns = range(len(messages))
    return _turns(messages, turns, tokenizer, completion_only)


def _turns(
    messages: list[dict], turns: range, tokenizer: Any, completion_only: bool
) -> list[tuple[str, bool]]:
    whole = _template(tokenizer, messages, False)
    if not completion_only:
        return [(whole, True)]
    end_of_turn = tokenizer.eos_token or ""
    found: list[tuple[str, bool]] = []
    done = 0
    for index in turns:
        if messages[index]["role"] != "assistant":
            continue
        before = _template(tokenizer, messages[:index], True) if index else ""
        last = index == len(messages) - 1
        through = whole if last else _template(tokenizer, messages[: index + 1], False)
        if not whole.startswith(through):
            continue  # the template writes this turn otherwise once others follow: it is context only
        if not whole.startswith(before):
            before = os.path.commonprefix([before, whole])
        start, end = max(len(before), done), len(through)
        if end_of_turn and end_of_turn in whole[start:end]:
            # What the template puts after the end of a turn is never generated.
            end = whole.rindex(end_of_turn, start, end) + len(end_of_turn)
        found += [(whole[done:start], False), (whole[start:end], True)]
        done = end
    rest = whole[done:]
    if rest.strip() or not found:
        found.append((rest, False))
    return [(text, learnt) for text, learnt in found if text]


def _template(tokenizer: Any, messages: list[dict], asking: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=asking, tokenize=False)
    except Exception as error:  # jinja2's TemplateError, or whatever a template raises
        said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise Problem(
            f"The model's chat template refused a conversation: {said}",
            "Check the order of the roles (most want user and assistant in turn), or leave the system prompt out.",
        ) from None


def _ended(text: str, tokenizer: Any) -> str:
    eos = tokenizer.eos_token or ""
    return text if eos and text.endswith(eos) else text + eos


def encode_sample(
    sample: dict[str, Any], tokenizer: Any, given: TrainSettings, system: str | None
) -> Encoded:
    """One sample's ids and labels, cut to the maximum length."""
    ids: list[int] = []
    labels: list[int] = []
    plain = "text" in sample or not getattr(tokenizer, "chat_template", None)
    for number, (text, learnt) in enumerate(segments(sample, tokenizer, system, given.completion_only)):
        piece = tokenizer(text, add_special_tokens=plain and number == 0, verbose=False)["input_ids"]
        if plain and number == 0 and len(piece) > 1 and piece[-1] == piece[-2] == tokenizer.eos_token_id:
            piece = piece[:-1]  # this tokenizer ends a text itself
        ids += piece
        labels += piece if learnt else [MASKED] * len(piece)
    cut = slice(None, given.max_length)
    return Encoded(sample["row"], tuple(ids[cut]), tuple(labels[cut]), len(ids))


# ---------------------------------------------------------------- all of them


def encode(
    data: Data,
    tokenizer: Any,
    given: TrainSettings,
    system: str | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Every sample, split into what is trained on and what is held back. Raises `Problem` where nothing is learnt."""
    found, skipped = [], list(data.skipped)
    reasons: dict[str, int] = {}
    for number, sample in enumerate(data.samples):
        made = encode_sample(sample, tokenizer, given, system)
        if made.learnt:
            found.append(made)
        else:
            cut = made.full > given.max_length
            why = (
                f"its prompt alone fills the {given.max_length:,} tokens"
                if cut
                else "it has no answer that could be learnt"
            )
            reasons[why] = reasons.get(why, 0) + 1
            skipped.append((sample["row"], why))
        if progress and number % 200 == 199:
            progress((number + 1) / len(data.samples), f"reading {data.title}")
    if not found:
        why = max(reasons, key=reasons.__getitem__)
        raise Problem(
            f"Nothing of {data.title} would be learnt: all of its {len(data.samples):,} samples are masked ({why}).",
            "Raise the maximum length, or shorten the prompts."
            if "fills" in why
            else "Chat data needs answers with the role assistant; or switch “completion only” off.",
        )
    train, held = _split(found, given)
    notes = list(data.notes)
    if skipped:
        notes.append(f"{len(skipped):,} of {len(data.samples) + len(data.skipped):,} rows are left out.")
    if data.form == "text" and given.completion_only:
        notes.append("Plain text has no prompt: all of it is learnt.")
    return Corpus(tuple(train), tuple(held), tuple(sorted(skipped)), tuple(notes))


def _split(found: list[Encoded], given: TrainSettings) -> tuple[list[Encoded], list[Encoded]]:
    """By the seed alone, so that the same rows are held back whenever the run is done again."""
    count = round(len(found) * given.held_back)
    if given.held_back and len(found) > 1:
        count = min(max(1, count), len(found) - 1)
    elif len(found) == 1:
        count = 0
    held = set(random.Random(given.seed).sample(range(len(found)), count))
    return [e for i, e in enumerate(found) if i not in held], [e for i, e in enumerate(found) if i in held]


def preview(
    data: Data, corpus: Corpus, tokenizer: Any, given: TrainSettings, samples: int = 5
) -> DataPreview:
    """What a person sees before training: `samples` samples spread over the data, and figures of all."""
    every = corpus.all
    step = max(1, len(every) // max(1, samples))
    shown = every[::step][:samples]
    masking = {
        "text": "Nothing is masked: plain text is learnt whole.",
        "chat": "Grey is masked: only what the assistant says is learnt.",
        "prompt": "Grey is masked: only the completions are learnt.",
    }[data.form]
    if not given.completion_only:
        masking = "Nothing is masked: prompts are learnt too."
    long = sorted(((e.row, e.full) for e in every if e.full > given.max_length), key=lambda x: -x[1])
    return DataPreview(
        title=data.title,
        form=data.form,
        columns=data.columns,
        other_columns=data.other_columns,
        rows=len(data.samples) + len(data.skipped),
        train_rows=len(corpus.train),
        eval_rows=len(corpus.held),
        fingerprint=data.fingerprint,
        samples=tuple(_shown(e, tokenizer) for e in shown),
        tokens=_statistics(every, given, len(corpus.skipped)),
        long=tuple(long[:20]),
        skipped=corpus.skipped[:20],
        notes=corpus.notes,
        masking=masking,
    )


def _shown(encoded: Encoded, tokenizer: Any) -> SamplePreview:
    pieces: list[Piece] = []
    start = 0
    flags = [label != MASKED for label in encoded.labels]
    for end in range(1, len(flags) + 1):
        if end == len(flags) or flags[end] != flags[start]:
            text = tokenizer.decode(list(encoded.ids[start:end]), clean_up_tokenization_spaces=False)
            pieces.append(Piece(text, flags[start], end - start))
            start = end
    return SamplePreview(
        encoded.row, tuple(pieces), len(encoded.ids), encoded.learnt, encoded.full - len(encoded.ids)
    )


def _statistics(every: tuple[Encoded, ...], given: TrainSettings, left_out: int) -> TokenStatistics:
    lengths = sorted(e.full for e in every)
    bound, histogram = 16, []
    while True:
        lower = histogram[-1][0] if histogram else 0
        histogram.append((bound, sum(lower < n <= bound for n in lengths)))
        if bound >= lengths[-1]:
            break
        bound *= 2
    return TokenStatistics(
        rows=len(every),
        total=sum(lengths),
        learnt=sum(e.learnt for e in every),
        minimum=lengths[0],
        median=int(statistics.median(lengths)),
        mean=statistics.fmean(lengths),
        p95=lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))],
        maximum=lengths[-1],
        over_length=sum(n > given.max_length for n in lengths),
        cut_tokens=sum(max(0, n - given.max_length) for n in lengths),
        left_out=left_out,
        histogram=tuple(histogram),
    )
