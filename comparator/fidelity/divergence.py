"""Two columns' logits for the same positions → how far apart they are. Pure statistics.

The
definitions are those of llama.cpp's `perplexity --kl-divergence` (tools/perplexity/perplexity.cpp) where it has
them; it scores the second half of each context, we score every position, and it has no reverse KL divergence.

Standard errors treat positions as independent, as llama.cpp does: se = sqrt((mean(x²) − mean(x)²) / (n − 1)).
Everything is in nats and float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

BLOCK_ROWS = 8  # rows of float64 that stay in a CPU's cache; 512 at a time ran at less than half the speed
TOP = 5
_GROUP = 64
_SAFE_EXPONENT = 500.0
_LEAST_REST = 1e-6  # a sum of probabilities that are printed with some seven digits is no more exact
PERCENTILES = {"p01": 1, "p05": 5, "p10": 10, "median": 50, "p90": 90, "p95": 95, "p99": 99, "p999": 99.9}


class ShapesDiffer(ValueError):
    """The two have not the same number of positions or tokens."""


class NotFinite(ArithmeticError):
    """Logits contain NaN or infinity. `side` is "reference" or "variant", `row` the position in what was compared."""

    def __init__(self, side: str, row: int):
        super().__init__(f"the {side}'s logits contain NaN or infinity at row {row}")
        self.side, self.row = side, row


@dataclass(frozen=True)
class Positions:
    """One value per position, float64 (n,) each; what the statistics are made of."""

    kl: np.ndarray  # KL(reference ‖ variant)
    kl_reverse: np.ndarray  # KL(variant ‖ reference)
    log_p: np.ndarray  # the variant's log-probability of the token that came next
    reference_log_p: np.ndarray
    agree: np.ndarray  # 1 where both put the same token first, else 0
    overlap: np.ndarray  # share of the reference's top 5 that are in the variant's top 5

    def __len__(self) -> int:
        return len(self.kl)


def joined(parts: Sequence[Positions]) -> Positions:
    """The positions of several chunks as one."""
    return Positions(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Positions)))


# ---------------------------------------------------------------- two tensors of logits → positions


def compare(reference: Any, variant: Any, targets: Any, block_rows: int = BLOCK_ROWS) -> Positions:
    """`reference`, `variant`: logits (n, vocabulary), torch tensors of any float dtype on one device;
    `targets`: (n,) the token that came next. Raises `NotFinite`, `ShapesDiffer`.

    With x, y the logits, p = softmax(x) and q = softmax(y), float64:
        KL(p ‖ q) = Σ p (log p − log q) = Σ p (x − y) − logsumexp(x) + logsumexp(y)
    which is exactly 0 where x and y are the same numbers. Rounding below 0 (some 1e-16) is cut off: a divergence
    is never negative.
    """
    import torch

    if reference.shape != variant.shape:
        raise ShapesDiffer(
            f"logits of shape {tuple(reference.shape)} and {tuple(variant.shape)} cannot be compared"
        )
    count, vocabulary = reference.shape
    targets = targets.to(reference.device)
    rows = min(block_rows, count)
    work = [torch.empty((rows, vocabulary), dtype=torch.float64, device=reference.device) for _ in range(3)]
    found: list[Any] = []
    for start in range(0, count, rows):
        x_given, y_given = reference[start : start + rows], variant[start : start + rows]
        x, y, difference = (w[: len(x_given)] for w in work)
        found.append(torch.stack(_block(x_given, y_given, targets[start : start + rows], x, y, difference)))
    values = torch.cat(found, dim=1).cpu().numpy() if found else np.empty((8, 0))
    _check_finite(reference, variant, values)
    return Positions(*values[:6])


def _block(x_given: Any, y_given: Any, targets: Any, x: Any, y: Any, difference: Any) -> list[Any]:
    """Some rows. `x`, `y`, `difference` are float64 buffers of their shape, overwritten: allocating them again each
    time costs more than the arithmetic."""
    import torch

    x.copy_(x_given)
    y.copy_(y_given)
    torch.sub(x, y, out=difference)
    x_max, x_top, x_first = _leaders(x)
    y_max, y_top, y_first = _leaders(y)
    overlap = (x_top.unsqueeze(-1) == y_top.unsqueeze(-2)).any(-1).sum(-1).to(x.dtype) / x_top.shape[-1]
    place = targets.unsqueeze(-1)
    x_target, y_target = x.gather(-1, place).squeeze(-1), y.gather(-1, place).squeeze(-1)
    x_sum, x_lse = _exponentials(x, x_max)
    y_sum, y_lse = _exponentials(y, y_max)
    forward = _dot(x, difference) / x_sum - x_lse + y_lse
    backward = -(_dot(y, difference) / y_sum) + x_lse - y_lse
    return [
        forward.clamp_(min=0),
        backward.clamp_(min=0),
        y_target - y_lse,
        x_target - x_lse,
        (x_first == y_first).to(x.dtype),
        overlap.to(x.dtype),
        x_lse,
        y_lse,
    ]


def _exponentials(logits: Any, highest: Any) -> tuple[Any, Any]:
    """Turn logits into weights in place, up to a factor by row; (their sums, logsumexp of the logits).

    float64 takes exp of anything up to 709, so on a CPU, where asking costs nothing, the usual subtraction of the
    maximum is left out where no row needs it: one pass less."""
    if logits.device.type == "cpu" and float(highest.abs().max()) < _SAFE_EXPONENT:
        total = logits.exp_().sum(-1)
        return total, total.log()
    total = logits.sub_(highest.unsqueeze(-1)).exp_().sum(-1)
    return total, highest + total.log()


def _leaders(logits: Any) -> tuple[Any, Any, Any]:
    """(maximum, ids of the top 5, id of the first) by row. Of equal maxima the lowest id is first, as in an argmax.

    The top 5 lie in the five groups of 64 tokens with the highest maxima, so only those are searched: a quarter
    of the time of a search through the vocabulary.
    """
    import torch

    rows, vocabulary = logits.shape
    groups = vocabulary // _GROUP
    best = min(TOP, vocabulary)
    if groups <= TOP:
        values, ids = logits.topk(best, dim=-1)
    else:
        grouped = logits[:, : groups * _GROUP].view(rows, groups, _GROUP)
        chosen = grouped.amax(-1).topk(TOP, dim=-1).indices
        inside = torch.arange(_GROUP, device=logits.device)
        candidates = (chosen.unsqueeze(-1) * _GROUP + inside).view(rows, -1)
        rest = torch.arange(groups * _GROUP, vocabulary, device=logits.device).expand(rows, -1)
        candidates = torch.cat([candidates, rest], dim=-1)
        values, order = logits.gather(-1, candidates).topk(best, dim=-1)
        ids = candidates.gather(-1, order)
    highest = values[:, :1]
    first = torch.where(values == highest, ids, vocabulary).amin(-1)
    # More may share the maximum than were looked at. A GPU is not asked: waiting for its answer costs more.
    if logits.device.type != "cpu" or bool((values[:, -1:] == highest).any()):
        first = logits.argmax(-1)
    return highest.squeeze(-1), ids, first


def _dot(a: Any, b: Any) -> Any:
    """Σ a·b by row."""
    import torch

    if a.device.type == "cpu":  # BLAS by row: half the time of a batched product
        return torch.stack([row @ other for row, other in zip(a, b, strict=True)])
    return torch.linalg.vecdot(a, b)


def _check_finite(reference: Any, variant: Any, values: np.ndarray) -> None:
    import torch

    fine = np.isfinite(values).all(axis=0)
    if fine.all():
        return
    row = int(np.argmin(fine))
    # Both can hold them (a masked token is −inf in either); the reference is named first.
    side = "variant" if bool(torch.isfinite(reference[row]).all()) else "reference"
    raise NotFinite(side, row)


def rank(logits: Any, token: int) -> int:
    """How many tokens come before `token`, logits (vocabulary,); 0: it is the greedy choice. Of equal logits the
    one with the lower id comes first, as in an argmax."""
    own = logits[token]
    return int((logits > own).sum()) + int((logits[:token] == own).sum())


def top(logits: Any, count: int = TOP) -> list[tuple[int, float]]:
    """The `count` most probable tokens of one position, logits (vocabulary,): (token id, probability)."""
    import torch

    p = torch.softmax(logits.to(torch.float64), dim=-1)
    best = p.topk(min(count, p.shape[-1]))
    return [(int(i), float(v)) for i, v in zip(best.indices, best.values, strict=True)]


def bucketed_kl(reference: Any, log_q: Mapping[int, float]) -> float:
    """A lower bound of KL(reference ‖ variant) in nats, where the variant gives some tokens' log-probabilities only.

    reference: logits (vocabulary,); log_q: nats by token id. With K the named tokens and p, q summed over all others:
        Σ_K p_i (log p_i − log q_i) + p_rest (log p_rest − log q_rest) ≤ KL(p ‖ q)
    which is the log-sum inequality. q_rest is 1 less the named ones, and no less than `_LEAST_REST`, which only lowers it.
    """
    import torch

    log_p = torch.log_softmax(reference.to(torch.float64), dim=-1)
    ids = [token for token in log_q if token < len(log_p)]
    ours = torch.tensor([log_q[token] for token in ids], dtype=torch.float64)
    theirs = log_p[ids].cpu()
    rest_p = max(0.0, 1.0 - float(theirs.exp().sum()))
    rest_q = max(_LEAST_REST, 1.0 - float(ours.exp().sum()))
    rest = rest_p * (math.log(rest_p) - math.log(rest_q)) if rest_p > 0 else 0.0
    return max(0.0, float((theirs.exp() * (theirs - ours)).sum()) + rest)


# ---------------------------------------------------------------- positions → figures


def statistics(found: Positions) -> dict[str, Any]:
    """Everything that `fidelity.text` of the comparison document says about the two distributions."""
    p, reference_p = np.exp(found.log_p), np.exp(found.reference_log_p)
    return {
        "tokens": len(found),
        **perplexities(found.log_p, found.reference_log_p),
        "kl": distribution(found.kl),
        "kl_reverse": distribution(found.kl_reverse),
        "delta_p": delta_p(p, reference_p),
        "top1": share(found.agree),
        "top5_overlap": _mean(found.overlap),
        "top5_overlap_se": standard_error(found.overlap),
    }


def floor(found: Positions) -> dict[str, Any]:
    """A column against itself, computed another way: what is rounding and not quantization."""
    whole = statistics(found)
    return {name: whole[name] for name in ("kl", "kl_reverse", "delta_p", "top1", "top5_overlap")}


def standard_error(values: np.ndarray) -> float | None:
    """sqrt((mean(x²) − mean(x)²) / (n − 1)), llama.cpp's `mean_and_uncertainty`; None below 2 values.

    The bracket is computed as mean((x − mean)²), the same number without its cancellation."""
    count = len(values)
    return float(np.sqrt(np.mean((values - np.mean(values)) ** 2) / (count - 1))) if count > 1 else None


def distribution(values: np.ndarray) -> dict[str, float | None]:
    """Mean ± standard error, median, percentiles (linear interpolation between ranks), minimum and maximum."""
    if not len(values):
        return {}
    ranked = {name: float(np.percentile(values, q)) for name, q in PERCENTILES.items()}
    return {
        "mean": _mean(values),
        "se": standard_error(values),
        "min": float(values.min()),
        **ranked,
        "max": float(values.max()),
    }


def delta_p(p: np.ndarray, reference_p: np.ndarray) -> dict[str, float | None]:
    """Δp = p(variant) − p(reference) of the token that came next; RMS Δp = sqrt(mean(Δp²)) with
    se(RMS) = se(Δp²) / (2 RMS), as llama.cpp has it."""
    difference = p - reference_p
    if not len(difference):
        return {}
    rms = float(np.sqrt(np.mean(difference**2)))
    square_se = standard_error(difference**2)
    rms_se = None if square_se is None else 0.0 if rms == 0 else square_se / (2 * rms)
    return {**distribution(difference), "rms": rms, "rms_se": rms_se}


def share(hits: np.ndarray) -> dict[str, float | None]:
    """A share f of n with se = sqrt(f (1 − f) / (n − 1)), llama.cpp's “same top p”."""
    if not len(hits):
        return {}
    mean = _mean(hits)
    return {"mean": mean, "se": math.sqrt(mean * (1 - mean) / (len(hits) - 1)) if len(hits) > 1 else None}


def perplexities(log_p: np.ndarray, reference_log_p: np.ndarray) -> dict[str, float | None]:
    """PPL = exp(−mean(log p)) of both, with se(PPL) = PPL · se(log p); their ratio and difference.

    ratio = exp(mean(log p_ref − log p)), se(ratio) = ratio · sqrt(σ² + σ_ref² − 2 cov);
    difference = PPL − PPL_ref, se = sqrt(PPL² σ² + PPL_ref² σ_ref² − 2 PPL PPL_ref cov); σ² and cov are those of
    the means (llama.cpp's `covariance`, over n − 1): the two columns read the same text, so they err together.
    A perplexity beyond a float's range is None.
    """
    count = len(log_p)
    if not count:
        return {}
    mean, reference_mean = _mean(log_p), _mean(reference_log_p)
    ppl, reference_ppl, ratio = _exp(-mean), _exp(-reference_mean), _exp(reference_mean - mean)
    found: dict[str, float | None] = {
        "ppl": ppl, "ppl_se": None, "reference_ppl": reference_ppl, "reference_ppl_se": None,
        "ppl_ratio": ratio, "ppl_ratio_se": None, "ppl_difference": None, "ppl_difference_se": None,
        "log_p_correlation": None,
    }  # fmt: skip
    if ppl is not None and reference_ppl is not None:
        found["ppl_difference"] = ppl - reference_ppl
    if count < 2:
        return found
    mine, its = log_p - mean, reference_log_p - reference_mean
    variance, reference_variance = np.mean(mine**2) / (count - 1), np.mean(its**2) / (count - 1)
    covariance = np.mean(mine * its) / (count - 1)
    if ppl is not None:
        found["ppl_se"] = float(ppl * math.sqrt(variance))
    if reference_ppl is not None:
        found["reference_ppl_se"] = float(reference_ppl * math.sqrt(reference_variance))
    if ratio is not None:
        found["ppl_ratio_se"] = float(ratio * standard_error(log_p - reference_log_p))
    if ppl is not None and reference_ppl is not None:
        # The square of |PPL a − PPL_ref b|, which rounding cannot make negative.
        found["ppl_difference_se"] = standard_error(ppl * log_p - reference_ppl * reference_log_p)
    if variance > 0 and reference_variance > 0:
        found["log_p_correlation"] = float(covariance / math.sqrt(variance * reference_variance))
    return found


def first_difference(agree: Iterable[float]) -> int | None:
    """The first position where the two do not put the same token first; None where they never part."""
    return next((number for number, same in enumerate(agree) if not same), None)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values))


def _exp(value: float) -> float | None:
    try:
        return math.exp(value)
    except OverflowError:
        return None


# ---------------------------------------------------------------- weights


def weight_error(weight: Any, reference: Any) -> dict[str, float | None]:
    """How far a dequantized weight W is from the reference's R, torch tensors of one shape:

    relative = ‖W − R‖_F / ‖R‖_F; sqnr_db = 10 log10(Σ R² / Σ (W − R)²); cosine = Σ W R / (‖W‖ ‖R‖);
    max_abs = max |W − R|. Equal weights have no SQNR (None), a zero reference no relative error and no cosine.
    Raises ValueError where the shapes differ. Sums are float64, in pieces that stay in a CPU's cache.
    """
    import torch

    if weight.shape != reference.shape:
        raise ValueError(
            f"weights of shape {tuple(weight.shape)} and {tuple(reference.shape)} cannot be compared"
        )
    ours, theirs = weight.reshape(-1), reference.reshape(-1)
    noise = signal = own = product = largest = 0.0
    step = 1 << (17 if ours.device.type == "cpu" else 24)
    for start in range(0, ours.numel(), step):
        w = ours[start : start + step].to(torch.float64)
        r = theirs[start : start + step].to(device=w.device, dtype=torch.float64)
        signal, own, product = signal + float(r @ r), own + float(w @ w), product + float(w @ r)
        w.sub_(r)
        noise, largest = noise + float(w @ w), max(largest, float(w.abs().max()))
    if not all(map(math.isfinite, (noise, signal, own, product, largest))):
        return {"relative": None, "sqnr_db": None, "cosine": None, "max_abs": None}
    return {
        "relative": math.sqrt(noise / signal) if signal else None,
        "sqnr_db": 10 * math.log10(signal / noise) if signal and noise else None,
        "cosine": max(-1.0, min(1.0, product / math.sqrt(own * signal))) if own and signal else None,
        "max_abs": largest,
    }
