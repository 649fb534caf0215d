"""Loaded models → how far one's predictions are from the other's. The torch side of fidelity.

Two ways to score: a given answer, forced token by token through the very steps that generation takes (a single
pass over the whole answer is another computation: int8 contradicts its own tokens in it), and a longer text,
window by window. Logits are compared as they come and never kept whole: at most two windows of them, a piece of a
third, and three blocks of 8 rows in float64. Knows token ids only: nothing of columns, events or pages.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparator.evaluation import Window, pieces, windows
from comparator.generate import Stepper, decoding, input_device, interruptible
from comparator.metrics import fidelity
from comparator.types import Problem, PromptFidelity, Stopped, TopToken

FLOOR_CHUNK = 64  # tokens at a time for a column's noise floor
Told = Callable[[float], None]  # how far, 0..1


@dataclass(frozen=True)
class Kept:
    """Logits on disk: `count` rows of `vocabulary` values, in the dtype they were computed in."""

    path: str
    count: int
    vocabulary: int
    dtype: str

    @property
    def bytes(self) -> int:
        width = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        return self.count * self.vocabulary * width

    def rows(self, start: int, end: int) -> Any:
        """Rows start..end as a tensor on the host, read now. Raises OSError where the file is gone or short."""
        import torch

        kind = getattr(torch, self.dtype)
        size = torch.empty((), dtype=kind).element_size()
        wanted = (end - start) * self.vocabulary
        with open(self.path, "rb") as file:
            file.seek(start * self.vocabulary * size)
            data = bytearray(file.read(wanted * size))
        if len(data) != wanted * size:
            raise OSError(f"{self.path} is shorter than it should be")
        return torch.frombuffer(data, dtype=kind).view(end - start, self.vocabulary)


class Keeper:
    """Writes rows of logits to a file as they come. `kept()` says what is there."""

    def __init__(self, path: Path | str):
        self.path, self.count, self.vocabulary, self.dtype = Path(path), 0, 0, "float32"
        self._file = self.path.open("wb")

    def add(self, logits: Any) -> None:
        """`logits` (n, vocabulary), any device and float dtype."""
        import torch

        host = logits.detach().to("cpu").contiguous()
        self.vocabulary, self.dtype = host.shape[-1], str(host.dtype).removeprefix("torch.")
        self._file.write(memoryview(host.view(torch.uint8).numpy()).cast("B"))
        self.count += len(host)

    def kept(self) -> Kept:
        self._file.close()
        return Kept(str(self.path), self.count, self.vocabulary, self.dtype)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


# ---------------------------------------------------------------- an answer, the way it was decoded


def forced(model: Any, prompt_ids: list[int], token_ids: list[int], cancel: threading.Event) -> Iterator[Any]:
    """The float32 logits (vocabulary,) before each of `token_ids`: one prefill of the prompt, then one token a
    step, the given ones pushed whatever the model would have chosen. Raises `Stopped`."""
    import torch

    stepper = Stepper(model, prompt_ids, len(token_ids))
    with interruptible(model, cancel), decoding(model) as begin_decoding:
        for step, token in enumerate(token_ids):
            if cancel.is_set():
                raise Stopped
            # By step: held across a yield, inference mode would leak to whoever asks for the next one.
            with torch.inference_mode():
                logits = stepper.next_logits()[0]
                stepper.push(token)
            if step == 0:
                begin_decoding()
            yield logits


def keep_answer(
    model: Any, prompt_ids: list[int], token_ids: list[int], path: Path, cancel: threading.Event, told: Told
) -> Kept:
    """The reference's own scores of its answer, to `path`: 4 bytes × vocabulary a token."""
    with Keeper(path) as keeper:
        with contextlib.closing(forced(model, prompt_ids, token_ids, cancel)) as steps:
            for step, logits in enumerate(steps):
                keeper.add(logits.unsqueeze(0))
                told((step + 1) / len(token_ids))
        return keeper.kept()


def score_answer(
    model: Any | None,
    prompt_ids: list[int],
    token_ids: list[int],
    reference: Kept,
    text_of: Callable[[int], str],
    cancel: threading.Event,
    told: Told,
) -> PromptFidelity:
    """One model's view of the reference's answer. `model` None: the reference itself, whose scores are there.

    `text_of` writes one token. Raises `fidelity.NotFinite` (its row is the position in the answer), `Stopped`,
    and `fidelity.ShapesDiffer` for another vocabulary.
    """
    import torch

    steps = (
        (reference.rows(step, step + 1)[0] for step in range(len(token_ids)))
        if model is None
        else forced(model, prompt_ids, token_ids, cancel)
    )
    found, ranks, tops, reference_tops = [], [], [], []
    with contextlib.closing(steps):
        for step, (token, logits) in enumerate(zip(token_ids, steps, strict=True)):
            ours, theirs = logits.to("cpu").unsqueeze(0), reference.rows(step, step + 1)
            try:
                found.append(fidelity.compare(theirs, ours, torch.tensor([token])))
            except fidelity.NotFinite as bad:
                raise fidelity.NotFinite(bad.side, step) from None
            ranks.append(fidelity.rank(ours[0], token))
            tops.append(_named(ours[0], text_of))
            reference_tops.append(_named(theirs[0], text_of))
            told((step + 1) / len(token_ids))
    whole = fidelity.joined(found)
    return PromptFidelity(
        token_ids=tuple(token_ids),
        tokens=tuple(text_of(token) for token in token_ids),
        kl=tuple(whole.kl.tolist()),
        p=_probabilities(whole.log_p),
        reference_p=_probabilities(whole.reference_log_p),
        rank=tuple(ranks),
        first_difference=fidelity.first_difference(whole.agree),
        top=tuple(tops),
        reference_top=tuple(reference_tops),
    )


def _probabilities(log_p: Any) -> tuple[float, ...]:
    import numpy as np

    return tuple(np.exp(log_p).tolist())


def _named(logits: Any, text_of: Callable[[int], str]) -> tuple[TopToken, ...]:
    return tuple(TopToken(text_of(token), p) for token, p in fidelity.top(logits))


# ---------------------------------------------------------------- a longer text, window by window


def window_logits(model: Any, ids: list[int], window: Window, cancel: threading.Event) -> Any:
    """Logits (scored positions, vocabulary) of one window in one forward pass, batch 1, in the model's own dtype."""
    import torch

    device = input_device(model)
    with torch.inference_mode(), interruptible(model, cancel):
        inputs = torch.tensor([ids[window.start : window.end]], dtype=torch.long, device=device)
        logits = model(input_ids=inputs, use_cache=False, return_dict=True).logits[0]
    return logits[window.scored]


def chunked_logits(
    model: Any, ids: list[int], window: Window, cancel: threading.Event
) -> Iterator[tuple[slice, Any]]:
    """The same window fed in pieces of 64 tokens through the key-value cache: (rows of what `window_logits` gives,
    logits of those rows). The same mathematics in another order, so what differs is rounding; with LLM.int8 also
    the outliers, which it picks by what is in the batch."""
    import torch

    feeder = _Feeder(model, ids[window.start : window.end])
    skip = window.first - window.start
    with interruptible(model, cancel):
        for start, end in pieces(window, FLOOR_CHUNK):
            with torch.inference_mode():
                logits = feeder.feed(end)
            low = max(start, skip)
            if end > low:
                yield slice(low - skip, end - skip), logits[low - start :]


class _Feeder(Stepper):
    """A `Stepper` that is fed several known tokens at a time and gives the logits of all of them."""

    def __init__(self, model: Any, token_ids: list[int]):
        super().__init__(model, token_ids, 0)
        self._extra.pop("logits_to_keep", None)

    def feed(self, end: int) -> Any:
        """(new tokens, vocabulary), in the model's dtype, for the tokens up to `end`."""
        self.length = end
        outputs = self._forward()
        return outputs.logits[0]


def can_be_fed_in_pieces(model: Any) -> bool:
    """State-space models take one token at a time after the first pass: they have no noise floor of this kind."""
    return bool(model._supports_default_dynamic_cache()) and "mamba" not in type(model).__name__.lower()


def score_text(
    model: Any,
    ids: list[int],
    context: int,
    stride: int,
    reference: Any,
    cancel: threading.Event,
    told: Told,
    with_floor: bool = True,
) -> dict[str, Any]:
    """`fidelity.text` of the document, without the text's name: `model` against `reference`, which is another
    model, the same one, or `Kept` scores of one.

    Raises `fidelity.NotFinite` (its row is the position in the text), `Stopped`, and `fidelity.ShapesDiffer`
    for another vocabulary.
    """
    import torch

    found, floor = [], []
    with_floor = with_floor and can_be_fed_in_pieces(model)
    cuts = windows(len(ids), context, stride)
    targets = torch.tensor(ids, dtype=torch.long)
    for number, window in enumerate(cuts):
        ours = window_logits(model, ids, window, cancel)
        theirs = _reference_logits(reference, model, ours, ids, window, cancel)
        expected = targets[window.first + 1 : window.end + 1].to(ours.device)
        found.append(_compared(theirs, ours, expected, window.first, cancel))
        del theirs
        told((number + (0.4 if with_floor else 1)) / len(cuts))
        if with_floor:
            for rows, again in chunked_logits(model, ids, window, cancel):
                floor.append(
                    _compared(
                        ours[rows], again, expected[rows], window.first + rows.start, cancel, floor=True
                    )
                )
        del ours
        told((number + 1) / len(cuts))
    figures = fidelity.statistics(fidelity.joined(found))
    figures |= {"context": context, "stride": stride, "windows": len(cuts)}
    if with_floor:
        figures["floor"] = {"chunk": FLOOR_CHUNK, **fidelity.floor(fidelity.joined(floor))}
    return figures


def _reference_logits(
    reference: Any, model: Any, ours: Any, ids: list[int], window: Window, cancel: Any
) -> Any:
    if reference is model:
        return ours
    if isinstance(reference, Kept):
        return reference.rows(window.first, window.end).to(ours.device)
    return window_logits(reference, ids, window, cancel).to(ours.device)


def _compared(
    theirs: Any, ours: Any, expected: Any, first: int, cancel: threading.Event, floor: bool = False
) -> fidelity.Positions:
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
            parts.append(fidelity.compare(theirs[part], ours[part], expected[part], rows))
        except fidelity.NotFinite as bad:
            raise fidelity.NotFinite("variant" if floor else bad.side, first + start + bad.row) from None
    return fidelity.joined(parts)


def block_rows(logits: Any) -> int:
    """8 rows stay in a CPU's cache; a GPU wants more at once, as many as three float64 copies fit in 48 MB."""
    if logits.device.type == "cpu":
        return fidelity.BLOCK_ROWS
    return max(fidelity.BLOCK_ROWS, int(48e6 // (3 * 8 * logits.shape[-1])))


def keep_text(
    model: Any, ids: list[int], context: int, stride: int, path: Path, cancel: threading.Event, told: Told
) -> Kept:
    """A model's scores of a whole text to disk, for when it and the other model do not fit together."""
    cuts = windows(len(ids), context, stride)
    with Keeper(path) as keeper:
        for number, window in enumerate(cuts):
            keeper.add(window_logits(model, ids, window, cancel))
            told((number + 1) / len(cuts))
        return keeper.kept()


def kept_bytes(model: Any, positions: int) -> int:
    """About what `keep_text` will write."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    width = 4 if weight is None else max(2, weight.element_size())
    return positions * vocabulary(model) * width


def vocabulary(model: Any) -> int:
    """Width of the logits, by the config."""
    return model.config.get_text_config(decoder=True).vocab_size


def explain_not_finite(bad: fidelity.NotFinite, name: str, where: str) -> Problem:
    """`where`: "the answer" or "the text"."""
    return Problem(
        f"The logits of {name} hold NaN or infinity at token {bad.row + 1:,} of {where}.",
        "Its divergence is not a number there, so none is given. Try dtype=bf16 or dtype=fp32 (fp16 has a narrow "
        "range), or another variant.",
    )
