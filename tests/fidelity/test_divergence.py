"""Every statistic against an independent computation in plain numpy, from stored float32 logits of a small model."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from comparator.fidelity import divergence  # noqa: E402

NAMES = {"p01": 1, "p05": 5, "p10": 10, "median": 50, "p90": 90, "p95": 95, "p99": 99, "p999": 99.9}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(reference logits, variant logits, next tokens): a Llama of four layers, and the same with its linear weights
    rounded to 4 bits; float32 files, read back."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=701, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(0, 701, (1, 331))
    folder = tmp_path_factory.mktemp("logits")
    with torch.inference_mode():
        np.save(folder / "reference.npy", model(ids).logits[0].numpy())
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                scale = module.weight.abs().amax() / 7
                module.weight.copy_((module.weight / scale).round() * scale)
        np.save(folder / "variant.npy", model(ids).logits[0].numpy())
    x, y = np.load(folder / "reference.npy")[:-1], np.load(folder / "variant.npy")[:-1]
    assert x.dtype == y.dtype == np.float32
    return x, y, ids[0, 1:].numpy()


def plain(x, y, targets):
    """The definitions, written out position by position with Python floats."""
    out = {name: [] for name in ("kl", "kl_reverse", "lq", "lp", "agree", "overlap")}
    for row_x, row_y, target in zip(x, y, targets, strict=True):
        row_x, row_y = row_x.astype(np.longdouble), row_y.astype(np.longdouble)
        p = np.exp(row_x - row_x.max()) / np.exp(row_x - row_x.max()).sum()
        q = np.exp(row_y - row_y.max()) / np.exp(row_y - row_y.max()).sum()
        out["kl"].append(float((p * (np.log(p) - np.log(q))).sum()))
        out["kl_reverse"].append(float((q * (np.log(q) - np.log(p))).sum()))
        out["lp"].append(float(np.log(p[target])))
        out["lq"].append(float(np.log(q[target])))
        out["agree"].append(float(p.argmax() == q.argmax()))
        out["overlap"].append(len(set(np.argsort(-p)[:5]) & set(np.argsort(-q)[:5])) / 5)
    return {name: np.array(values) for name, values in out.items()}


@pytest.fixture(scope="module")
def both(stored):
    x, y, targets = stored
    found = divergence.compare(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(targets))
    return found, plain(x, y, targets)


def close(value, expected, what):
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-12), f"{what}: {value}, by hand {expected}"


def test_each_position(both):
    found, by_hand = both
    pairs = (("kl", "kl"), ("kl_reverse", "kl_reverse"), ("log_p", "lq"), ("reference_log_p", "lp"),
             ("agree", "agree"), ("overlap", "overlap"))  # fmt: skip
    for name, other in pairs:
        np.testing.assert_allclose(getattr(found, name), by_hand[other], rtol=1e-9, err_msg=name)
    assert 0 < by_hand["agree"].mean() < 1, "the sample is too easy: agreement is all or nothing"


def check_distribution(given, values, what):
    n = len(values)
    close(given["mean"], sum(values) / n, f"{what} mean")
    variance = sum((v - sum(values) / n) ** 2 for v in values) / (n - 1)
    close(given["se"], math.sqrt(variance / n), f"{what} standard error")
    ordered = sorted(values)
    for name, q in NAMES.items():
        place = (n - 1) * q / 100
        low = math.floor(place)
        high = min(low + 1, n - 1)
        close(given[name], ordered[low] + (ordered[high] - ordered[low]) * (place - low), f"{what} {name}")
    assert (given["min"], given["max"]) == (ordered[0], ordered[-1])


def test_divergences_and_delta_p(both):
    found, by_hand = both
    given = divergence.statistics(found)
    assert given["tokens"] == len(by_hand["kl"])
    check_distribution(given["kl"], list(found.kl), "KL")
    check_distribution(given["kl_reverse"], list(found.kl_reverse), "reverse KL")
    delta = np.exp(by_hand["lq"]) - np.exp(by_hand["lp"])
    check_distribution(given["delta_p"], list(np.exp(found.log_p) - np.exp(found.reference_log_p)), "Δp")
    close(given["delta_p"]["mean"], delta.mean(), "Δp from by-hand probabilities")
    n, square = len(delta), delta**2
    rms = math.sqrt(square.mean())
    close(given["delta_p"]["rms"], rms, "RMS Δp")
    close(given["delta_p"]["rms_se"], square.std(ddof=1) / math.sqrt(n) / (2 * rms), "± RMS Δp")


def test_perplexities(both):
    found, by_hand = both
    given = divergence.statistics(found)
    lq, lp, n = by_hand["lq"], by_hand["lp"], len(by_hand["lq"])
    ppl, base = math.exp(-lq.mean()), math.exp(-lp.mean())
    covariance = np.cov(lq, lp, ddof=1) / n  # of the means
    close(given["ppl"], ppl, "perplexity")
    close(given["ppl_se"], ppl * math.sqrt(covariance[0, 0]), "± perplexity")
    close(given["reference_ppl"], base, "the reference's perplexity")
    close(given["reference_ppl_se"], base * math.sqrt(covariance[1, 1]), "± the reference's perplexity")
    log_ratio_se = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    close(given["ppl_ratio"], ppl / base, "ratio")
    close(given["ppl_ratio_se"], ppl / base * log_ratio_se, "± ratio")
    close(given["ppl_difference"], ppl - base, "difference")
    spread = ppl**2 * covariance[0, 0] + base**2 * covariance[1, 1] - 2 * ppl * base * covariance[0, 1]
    close(given["ppl_difference_se"], math.sqrt(spread), "± difference")
    close(given["log_p_correlation"], np.corrcoef(lq, lp)[0, 1], "correlation")


def test_shares(both):
    found, by_hand = both
    given, n = divergence.statistics(found), len(by_hand["agree"])
    f = by_hand["agree"].mean()
    close(given["top1"]["mean"], f, "top-1 agreement")
    close(given["top1"]["se"], math.sqrt(f * (1 - f) / (n - 1)), "± top-1 agreement")
    close(given["top5_overlap"], by_hand["overlap"].mean(), "top-5 overlap")
    close(given["top5_overlap_se"], by_hand["overlap"].std(ddof=1) / math.sqrt(n), "± top-5 overlap")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_column_against_itself_is_exactly_nothing(stored, dtype):
    x = torch.from_numpy(stored[0]).to(getattr(torch, dtype))
    found = divergence.compare(x, x.clone(), torch.from_numpy(stored[2]))
    given = divergence.statistics(found)
    for name in ("kl", "kl_reverse", "delta_p"):
        assert set(given[name].values()) == {0.0}, f"{name} of equal logits is not exactly 0"
    assert given["top1"]["mean"] == given["top5_overlap"] == given["ppl_ratio"] == 1.0
    assert given["ppl_difference"] == 0.0


def test_the_size_of_a_block_changes_nothing(stored):
    x, y, targets = (torch.from_numpy(a) for a in stored)
    one, many = (divergence.compare(x, y, targets, rows) for rows in (1, 100))
    np.testing.assert_allclose(one.kl, many.kl, rtol=1e-10, atol=1e-14)
    assert (one.agree == many.agree).all() and (one.overlap == many.overlap).all()


@pytest.mark.parametrize("offset", [0.0, 450.0, 900.0, -3000.0])
def test_logits_of_any_size(stored, offset):
    """exp of a float64 ends at 709: an offset changes no probability, so it may change no figure."""
    x, y, targets = (torch.from_numpy(a) for a in stored)
    plain_found = divergence.compare(x[:20], y[:20], targets[:20])
    found = divergence.compare(x[:20].double() + offset, y[:20].double() + offset, targets[:20])
    np.testing.assert_allclose(found.kl, plain_found.kl, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found.log_p, plain_found.log_p, rtol=1e-7)


@pytest.mark.parametrize("vocabulary", [3, 64, 320, 385, 1000])
def test_top_tokens_with_many_ties(vocabulary):
    """bf16 logits tie all the time; the first of equals has the lowest id, as in an argmax."""
    torch.manual_seed(vocabulary)
    x, y = (torch.randint(0, 12, (40, vocabulary)).to(torch.bfloat16) for _ in range(2))
    found = divergence.compare(x, y, torch.zeros(40, dtype=torch.long))
    by_hand = [
        float(int(np.argmax(a)) == int(np.argmax(b)))
        for a, b in zip(x.float().numpy(), y.float().numpy(), strict=True)
    ]
    assert found.agree.tolist() == by_hand, "ties are broken differently from an argmax"
    for row in x[:5]:
        order = np.lexsort((np.arange(vocabulary), -row.float().numpy()))
        assert [divergence.rank(row, int(t)) for t in order] == list(range(vocabulary))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["reference", "variant"])
def test_what_is_not_finite_is_named(stored, side, bad):
    x, y, targets = (torch.from_numpy(a).clone() for a in stored)
    (x if side == "reference" else y)[17, 300] = bad
    with pytest.raises(divergence.NotFinite) as caught:
        divergence.compare(x, y, targets)
    assert (caught.value.side, caught.value.row) == (side, 17)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="cannot be compared"):
        divergence.compare(torch.zeros(4, 10), torch.zeros(4, 11), torch.zeros(4, dtype=torch.long))


def test_one_position_has_no_standard_error():
    x, y = torch.randn(1, 50), torch.randn(1, 50)
    given = divergence.statistics(divergence.compare(x, y, torch.tensor([3])))
    assert given["kl"]["se"] is given["ppl_se"] is given["top1"]["se"] is None
    assert given["kl"]["mean"] == given["kl"]["median"] > 0


def test_perplexity_beyond_a_float_is_not_a_figure():
    given = divergence.perplexities(np.array([-2000.0, -1500.0]), np.array([-1.0, -2.0]))
    assert given["ppl"] is None and given["ppl_se"] is None and given["reference_ppl"] > 0


def test_first_difference():
    assert divergence.first_difference([1, 1, 0, 1]) == 2
    assert divergence.first_difference([1, 1]) is None


def test_weight_error():
    rng = np.random.default_rng(3)
    r = rng.normal(size=(300, 500)).astype(np.float32)
    w = (r + 0.05 * rng.normal(size=r.shape)).astype(np.float32)
    given = divergence.weight_error(torch.from_numpy(w), torch.from_numpy(r))
    w, r = w.astype(np.float64), r.astype(np.float64)
    close(given["relative"], np.linalg.norm(w - r) / np.linalg.norm(r), "relative Frobenius")
    close(given["sqnr_db"], 10 * np.log10((r**2).sum() / ((w - r) ** 2).sum()), "SQNR")
    close(given["cosine"], (w * r).sum() / np.linalg.norm(w) / np.linalg.norm(r), "cosine")
    close(given["max_abs"], np.abs(w - r).max(), "largest difference")
    same = divergence.weight_error(torch.from_numpy(r), torch.from_numpy(r))
    assert (same["relative"], same["max_abs"], same["sqnr_db"]) == (0.0, 0.0, None)
    assert same["cosine"] == pytest.approx(1)
    with pytest.raises(ValueError):
        divergence.weight_error(torch.zeros(2, 3), torch.zeros(3, 2))


def test_what_some_tokens_say_is_a_lower_bound_and_all_of_them_the_divergence():
    """Against KL written out in numpy, for distributions near to each other and far apart."""
    random = np.random.default_rng(3)
    for spread in (0.01, 0.3, 3.0):
        x = random.normal(0, 4, 400)
        y = x + random.normal(0, spread, 400)
        p, q = (v - np.log(np.exp(v).sum()) for v in (x, y))
        exact, order = float((np.exp(p) * (p - q)).sum()), np.argsort(-q)
        bounds = [
            divergence.bucketed_kl(torch.tensor(x), {int(i): float(q[i]) for i in order[:count]})
            for count in (1, 5, 20, 100, 400)
        ]
        assert all(low <= high + 1e-9 for low, high in zip(bounds, [*bounds[1:], exact], strict=True)), (
            "a finer partition has the larger divergence, and none more than the whole"
        )
        assert bounds[-1] == pytest.approx(exact, rel=1e-6)
    assert divergence.bucketed_kl(torch.zeros(10), {999: -1.0}) >= 0, "a token of another vocabulary"
