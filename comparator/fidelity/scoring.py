"""Resident columns → how far one's predictions are from the other's.

Two ways to score: a given answer, forced token by token through the very steps that generation takes (a single
pass over the whole answer is another computation: int8 contradicts its own tokens in it), and a longer text,
window by window. Logits are compared as they come and never kept whole: at most two windows of them, a piece of a
third, and three blocks of 8 rows in float64. A runtime gives them as torch tensors or as numpy arrays.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from comparator.core.errors import Stopped, UserError
from comparator.core.messages import Prompt
from comparator.core.result import PromptFidelity, TopToken
from comparator.fidelity import divergence
from comparator.fidelity.eval_text import Window, windows
from comparator.fidelity.logits_store import LogitsWriter, StoredLogits
from comparator.runtimes import Choices, ResidentModel

FLOOR_CHUNK = 64  # tokens at a time for a column's noise floor
OnProgress = Callable[[float], None]  # how far, 0..1


# ---------------------------------------------------------------- an answer, the way it was decoded


def forced(
    column: ResidentModel, prompt_ids: list[int], token_ids: list[int], cancel: threading.Event
) -> Iterator[Any]:
    """The float32 logits (vocabulary,) before each of `token_ids`, as a tensor. Raises `Stopped`."""
    import torch

    with contextlib.closing(column.answer_logits(prompt_ids, token_ids, cancel)) as steps:
        yield from map(torch.as_tensor, steps)


def keep_answer(
    column: ResidentModel,
    prompt_ids: list[int],
    token_ids: list[int],
    path: Path,
    cancel: threading.Event,
    on_progress: OnProgress,
) -> StoredLogits:
    """The reference's own scores of its answer, to `path`: 4 bytes × vocabulary a token."""
    with LogitsWriter(path) as keeper:
        with contextlib.closing(forced(column, prompt_ids, token_ids, cancel)) as steps:
            for step, logits in enumerate(steps):
                keeper.add(logits.unsqueeze(0))
                on_progress((step + 1) / len(token_ids))
        return keeper.kept()


def score_answer(
    column: ResidentModel | None,
    prompt_ids: list[int],
    token_ids: list[int],
    reference: StoredLogits,
    text_of: Callable[[int], str],
    cancel: threading.Event,
    on_progress: OnProgress,
) -> PromptFidelity:
    """One column's view of the reference's answer. `column` None: the reference itself, whose scores are there.

    `text_of` writes one token. Raises `fidelity.NotFinite` (its row is the position in the answer), `Stopped`,
    and `fidelity.ShapesDiffer` for another vocabulary.
    """
    import torch

    steps = (
        (reference.rows(step, step + 1)[0] for step in range(len(token_ids)))
        if column is None
        else forced(column, prompt_ids, token_ids, cancel)
    )
    found, ranks, tops, reference_tops = [], [], [], []
    with contextlib.closing(steps):
        for step, (token, logits) in enumerate(zip(token_ids, steps, strict=True)):
            ours, theirs = logits.to("cpu").unsqueeze(0), reference.rows(step, step + 1)
            try:
                found.append(divergence.compare(theirs, ours, torch.tensor([token])))
            except divergence.NotFinite as bad:
                raise divergence.NotFinite(bad.side, step) from None
            ranks.append(divergence.rank(ours[0], token))
            tops.append(_named(ours[0], text_of))
            reference_tops.append(_named(theirs[0], text_of))
            on_progress((step + 1) / len(token_ids))
    whole = divergence.joined(found)
    return PromptFidelity(
        token_ids=tuple(token_ids),
        tokens=tuple(text_of(token) for token in token_ids),
        kl=tuple(whole.kl.tolist()),
        p=_probabilities(whole.log_p),
        reference_p=_probabilities(whole.reference_log_p),
        rank=tuple(ranks),
        first_difference=divergence.first_difference(whole.agree),
        top=tuple(tops),
        reference_top=tuple(reference_tops),
    )


def score_choices(
    column: ResidentModel,
    prompt: Prompt,
    token_ids: list[int],
    reference: StoredLogits,
    text_of: Callable[[int], str],
    cancel: threading.Event,
    on_progress: OnProgress,
) -> PromptFidelity:
    """`score_answer` for a column without full logits: KL is a lower bound, and – where it names no probabilities.

    Where the column cannot be made to follow the reference's answer, the entries end at the first difference.
    """
    import torch

    with contextlib.closing(column.answer_choices(prompt, token_ids, cancel)) as steps:
        choices = []
        for step, at in enumerate(steps):
            choices.append(at)
            on_progress((step + 1) / len(token_ids))
    rows = [reference.rows(step, step + 1)[0] for step in range(len(choices))]
    theirs = [torch.softmax(row.to(torch.float64), dim=-1) for row in rows]
    answer = token_ids[: len(choices)]
    named = bool(choices) and all(at.log_p for at in choices)
    return PromptFidelity(
        token_ids=tuple(token_ids),
        tokens=tuple(text_of(token) for token in token_ids),
        kl=tuple(divergence.bucketed_kl(row, at.log_p) for row, at in zip(rows, choices, strict=True))
        if named
        else (),
        p=tuple(_probability(at, token) for at, token in zip(choices, answer, strict=True)) if named else (),
        reference_p=tuple(float(p[token]) for p, token in zip(theirs, answer, strict=True)),
        rank=tuple(_rank(at, token) for at, token in zip(choices, answer, strict=True)),
        first_difference=divergence.first_difference(
            at.first == int(row.argmax()) for at, row in zip(choices, rows, strict=True)
        ),
        top=tuple(_likeliest(at, text_of) for at in choices) if named else (),
        reference_top=tuple(_named(row, text_of) for row in rows),
        top_k=max((len(at.log_p) for at in choices), default=0) if named else 0,
        forced=len(choices) == len(token_ids),
    )


def compare_tokens(
    reference_ids: Sequence[int], token_ids: Sequence[int], text_of: Callable[[int], str]
) -> PromptFidelity:
    """Two answers up to where they first differ: only there are both after the same text."""
    pairs = list(zip_longest(reference_ids, token_ids[: len(reference_ids)]))
    first = divergence.first_difference(ours == theirs for theirs, ours in pairs)
    compared = len(pairs) if first is None else first + 1
    return PromptFidelity(
        token_ids=tuple(reference_ids),
        tokens=tuple(map(text_of, reference_ids)),
        rank=tuple(None if step == first else 0 for step in range(compared)),
        first_difference=first,
        top_k=0,
        forced=compared == len(reference_ids),
    )


def _probability(at: Choices, token: int) -> float | None:
    return math.exp(at.log_p[token]) if token in at.log_p else None


def _rank(at: Choices, token: int) -> int | None:
    """How many tokens come before it; None where it is not among those that the column names."""
    if token == at.first:
        return 0
    if token not in at.log_p:
        return None
    return max(1, sum(p > at.log_p[token] for p in at.log_p.values()))


def _likeliest(at: Choices, text_of: Callable[[int], str]) -> tuple[TopToken, ...]:
    best = sorted(at.log_p.items(), key=lambda pair: -pair[1])[: divergence.TOP]
    return tuple(TopToken(text_of(token), math.exp(p)) for token, p in best)


def _probabilities(log_p: Any) -> tuple[float, ...]:
    import numpy as np

    return tuple(np.exp(log_p).tolist())


def _named(logits: Any, text_of: Callable[[int], str]) -> tuple[TopToken, ...]:
    return tuple(TopToken(text_of(token), p) for token, p in divergence.top(logits))


# ---------------------------------------------------------------- a longer text, window by window


def window_logits(column: ResidentModel, ids: list[int], window: Window, cancel: threading.Event) -> Any:
    """Logits (scored positions, vocabulary) of one window in one forward pass, as a tensor."""
    import torch

    skip = window.first - window.start
    return torch.as_tensor(column.window_logits(ids[window.start : window.end], skip, cancel))


def chunked_logits(
    column: ResidentModel, ids: list[int], window: Window, cancel: threading.Event
) -> Iterator[tuple[slice, Any]] | None:
    """The same window in pieces of `FLOOR_CHUNK` tokens through the key-value cache: (rows of what `window_logits` gives,
    logits of those rows). None where the column cannot do that."""
    import torch

    skip = window.first - window.start
    pieces = column.chunked_logits(ids[window.start : window.end], skip, FLOOR_CHUNK, cancel)
    return None if pieces is None else ((rows, torch.as_tensor(logits)) for rows, logits in pieces)


def score_text(
    column: ResidentModel,
    ids: list[int],
    context: int,
    stride: int,
    reference: ResidentModel | StoredLogits,
    cancel: threading.Event,
    on_progress: OnProgress,
    with_floor: bool = True,
) -> dict[str, Any]:
    """`fidelity.text` of the document, without the text's name: `column` against `reference`, which is another
    column, the same one, or the stored logits of one.

    Raises `fidelity.NotFinite` (its row is the position in the text), `Stopped`, and `fidelity.ShapesDiffer`
    for another vocabulary.
    """
    import numpy as np
    import torch

    from comparator.fidelity import length

    found, floor = [], []
    cuts = windows(len(ids), context, stride)
    targets = torch.tensor(ids, dtype=torch.long)
    for number, window in enumerate(cuts):
        ours = window_logits(column, ids, window, cancel)
        theirs = _reference_logits(reference, column, ours, ids, window, cancel)
        expected = targets[window.first + 1 : window.end + 1].to(ours.device)
        found.append(_compared(theirs, ours, expected, window.first, cancel))
        del theirs
        on_progress((number + (0.4 if with_floor else 1)) / len(cuts))
        pieces = chunked_logits(column, ids, window, cancel) if with_floor else None
        with_floor = pieces is not None
        if with_floor:
            for rows, again in pieces:
                floor.append(
                    _compared(
                        ours[rows], again, expected[rows], window.first + rows.start, cancel, floor=True
                    )
                )
        del ours
        on_progress((number + 1) / len(cuts))
    whole = divergence.joined(found)
    read = np.concatenate([np.arange(w.first, w.end) - w.start + 1 for w in cuts])
    figures = divergence.statistics(whole)
    figures |= {
        "context": context,
        "stride": stride,
        "windows": len(cuts),
        "by_context": length.by_context(whole, read),
    }
    if with_floor:
        figures["floor"] = {"chunk": FLOOR_CHUNK, **divergence.floor(divergence.joined(floor))}
    return figures


def _reference_logits(
    reference: Any, column: ResidentModel, ours: Any, ids: list[int], window: Window, cancel: Any
) -> Any:
    if reference is column:
        return ours
    if isinstance(reference, StoredLogits):
        return reference.rows(window.first, window.end).to(ours.device)
    return window_logits(reference, ids, window, cancel).to(ours.device)


def _compared(
    theirs: Any, ours: Any, expected: Any, first: int, cancel: threading.Event, floor: bool = False
) -> divergence.Positions:
    """Compare in slices, so that Stop is heard within a large window too."""
    parts = []
    rows = block_rows(ours)
    # On a GPU the whole window is a matter of milliseconds, and each slice a wait for its figures.
    step = rows * max(1, 64 // rows) if ours.device.type == "cpu" else max(len(ours), 1)
    for start in range(0, len(ours), step):
        if cancel.is_set():
            raise Stopped
        part = slice(start, start + step)
        try:
            parts.append(divergence.compare(theirs[part], ours[part], expected[part], rows))
        except divergence.NotFinite as bad:
            raise divergence.NotFinite("variant" if floor else bad.side, first + start + bad.row) from None
    return divergence.joined(parts)


def block_rows(logits: Any) -> int:
    """8 rows stay in a CPU's cache; a GPU wants more at once, as many as three float64 copies fit in 48 MB."""
    if logits.device.type == "cpu":
        return divergence.BLOCK_ROWS
    return max(divergence.BLOCK_ROWS, int(48e6 // (3 * 8 * logits.shape[-1])))


def keep_text(
    column: ResidentModel,
    ids: list[int],
    context: int,
    stride: int,
    path: Path,
    cancel: threading.Event,
    on_progress: OnProgress,
) -> StoredLogits:
    """A column's scores of a whole text to disk, for when it and the other column do not fit together."""
    cuts = windows(len(ids), context, stride)
    with LogitsWriter(path) as keeper:
        for number, window in enumerate(cuts):
            keeper.add(window_logits(column, ids, window, cancel))
            on_progress((number + 1) / len(cuts))
        return keeper.kept()


def explain_not_finite(bad: divergence.NotFinite, name: str, where: str) -> UserError:
    """`where`: "the answer" or "the text"."""
    return UserError(
        f"The logits of {name} contain NaN or infinity at token {bad.row + 1:,} of {where}.",
        "Its divergence is undefined there, so none is reported. Try dtype=bf16 or dtype=fp32 (fp16 has a narrow "
        "range), or another variant.",
    )
