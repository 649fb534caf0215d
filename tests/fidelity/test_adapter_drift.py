"""The drift of an adapter's effect, checked by hand on small vocabularies."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from comparator.fidelity.adapter_drift import compare  # noqa: E402


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def softmax(values):
    exp = [math.exp(v) for v in values]
    return [e / sum(exp) for e in exp]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_the_same_effect_on_two_bases_has_no_drift():
    """Adding the same vector to both, up to a constant, is the same effect, however different the bases are."""
    base, other, effect = logits([1.0, -2.0, 0.5]), logits([-3.0, 0.0, 4.0]), logits([0.3, 2.0, -1.0])
    drift, there, here = compare(base + effect + 5.0, base, other + effect - 3.0, other)
    assert float(drift) == pytest.approx(0.0, abs=1e-6)
    assert float(there) > 0 and float(here) > 0 and float(there) != pytest.approx(float(here))


def test_an_effect_that_is_missing_drifts_by_its_whole_size():
    base, effect = logits([1.0, -2.0, 0.5]), logits([0.3, 2.0, -1.0])
    drift, there, here = compare(base + effect, base, base, base)
    assert float(drift) == pytest.approx(float(there))
    assert float(here) == 0.0


def test_against_the_definition_written_out():
    r, ra, v, va = [0.1, 0.7, -1.0], [1.2, 0.2, -0.5], [0.0, 0.9, -0.7], [1.0, 0.6, -1.5]
    lr, lva, lv = (
        [math.log(p) for p in softmax(r)],
        [math.log(p) for p in softmax(va)],
        [math.log(p) for p in softmax(v)],
    )
    moved = softmax([a + b - c for a, b, c in zip(lr, lva, lv, strict=True)])
    drift, there, here = compare(logits(ra), logits(r), logits(va), logits(v))
    assert float(drift) == pytest.approx(kl(softmax(ra), moved), rel=1e-6)
    assert float(there) == pytest.approx(kl(softmax(ra), softmax(r)), rel=1e-6)
    assert float(here) == pytest.approx(kl(softmax(va), softmax(v)), rel=1e-6)
