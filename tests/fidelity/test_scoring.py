"""Scoring with real weights: the first two layers of the built-in model, and whole comparisons of it."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from comparator.core.errors import Stopped, UserError  # noqa: E402
from comparator.core.request import EvalSettings  # noqa: E402
from comparator.fidelity import (  # noqa: E402
    divergence,
    eval_text,
    scoring,
    sensitivity,
    weight_error,
)

NEVER = threading.Event()


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def models(two_layers):
    """(fp32, bf16 and nf4 of the cut model as resident models, token ids of the bundled text)."""
    from transformers import AutoTokenizer

    from comparator.backends import resolve
    from comparator.core.settings import Settings
    from comparator.engine.pool import Pool
    from comparator.sources import open_checkpoint

    pool, checkpoint = Pool(Settings()), open_checkpoint(str(two_layers), settings=Settings())
    columns = [
        pool.load(checkpoint, resolve(n), None, True, set(), quiet, NEVER)[0] for n in ("fp32", "bf16", "nf4")
    ]
    yield *columns, eval_text.encode(AutoTokenizer.from_pretrained(two_layers), EvalSettings())
    pool.unload()


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("count", "context", "stride"), [(10, 4, 4), (11, 4, 2), (513, 512, 512), (700, 64, 17), (5, 4, 1)]
)
def test_every_position_with_a_next_token_is_scored_once(count, context, stride):
    cuts = eval_text.windows(count, context, stride)
    scored = [p for w in cuts for p in range(w.first, w.end)]
    assert scored == list(range(count - 1))
    assert all(w.end - w.start <= context and w.start <= w.first < w.end for w in cuts)
    # All but the first window bring at least context − stride tokens of context along.
    assert all(w.first - w.start >= context - stride for w in cuts[1:])


# ---------------------------------------------------------------- a longer text


def by_hand(reference, model, ids, context):
    """Windows of `context`, plain numpy on float32 logits that were stored whole."""
    kl, log_q = [], []
    for start in range(0, len(ids) - 1, context):
        end = min(start + context, len(ids) - 1)
        with torch.inference_mode():
            given = torch.tensor([ids[start:end]])
            x, y = (m.model(given).logits[0].float().numpy() for m in (reference, model))
        x, y = x.astype(np.float64), y.astype(np.float64)
        log_p = x - x.max(-1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
        log_r = y - y.max(-1, keepdims=True)
        log_r -= np.log(np.exp(log_r).sum(-1, keepdims=True))
        kl += list((np.exp(log_p) * (log_p - log_r)).sum(-1))
        log_q += list(log_r[np.arange(end - start), ids[start + 1 : end + 1]])
    return np.array(kl), np.array(log_q)


def test_a_text_against_plain_numpy(models):
    fp32, _, nf4, ids = models
    ids = ids[:300]
    given = scoring.score_text(nf4, ids, 128, 128, fp32, NEVER, quiet, with_floor=False)
    kl, log_q = by_hand(fp32, nf4, ids, 128)
    assert given["tokens"] == len(kl) == 299 and given["windows"] == 3
    assert given["kl"]["mean"] == pytest.approx(kl.mean(), rel=1e-5)
    assert given["kl"]["p99"] == pytest.approx(np.percentile(kl, 99), rel=1e-5)
    assert given["ppl"] == pytest.approx(np.exp(-log_q.mean()), rel=1e-5)
    assert "floor" not in given


def test_the_noise_floor_is_the_column_against_itself(models):
    _, bf16, nf4, ids = models
    given = scoring.score_text(bf16, ids[:400], 256, 256, bf16, NEVER, quiet)
    assert set(given["kl"].values()) == {0.0}, "a column against itself must give exactly 0"
    assert given["ppl"] == given["reference_ppl"]
    assert given["floor"]["chunk"] == 64
    # Rounding: there, or nothing at all, but far from what quantization does.
    quantized = scoring.score_text(nf4, ids[:400], 256, 256, bf16, NEVER, quiet, with_floor=False)
    assert 0 <= given["floor"]["kl"]["mean"] < quantized["kl"]["mean"] / 5


def test_pieces_through_the_cache_are_the_same_window(models):
    fp32, _, _, ids = models
    window = eval_text.Window(0, 200, 50)
    whole = scoring.window_logits(fp32, ids, window, NEVER)
    again = torch.empty_like(whole)
    for rows, logits in scoring.chunked_logits(fp32, ids, window, NEVER):
        again[rows] = logits
    torch.testing.assert_close(again, whole, rtol=1e-3, atol=1e-3)


def test_kept_scores_give_the_same_figures(models, tmp_path):
    fp32, bf16, nf4, ids = models
    for reference in (fp32, bf16):
        kept = scoring.keep_text(reference, ids[:300], 128, 64, tmp_path / "scores", NEVER, quiet)
        assert (tmp_path / "scores").stat().st_size == kept.count * kept.vocabulary * (
            4 if reference is fp32 else 2
        )
        direct = scoring.score_text(nf4, ids[:300], 128, 64, reference, NEVER, quiet, with_floor=False)
        assert scoring.score_text(nf4, ids[:300], 128, 64, kept, NEVER, quiet, with_floor=False) == direct


def test_logits_are_never_kept_whole(models):
    """At most 64 MB and three windows of logits above what is there, whatever the text's length."""
    from comparator.metrics import memory

    _, bf16, nf4, ids = models
    limit = 64e6 + 3 * 256 * bf16.vocabulary * 2
    scoring.score_text(nf4, ids[:200], 256, 256, bf16, NEVER, quiet)  # what libraries set up at first use
    peaks = []
    for _ in range(3):  # the process's memory is what is read: what else happens in it only ever adds
        memory.give_back()
        with memory.track("cpu") as peak:
            scoring.score_text(nf4, ids[:1600], 256, 256, bf16, NEVER, quiet)
        peaks.append(peak.above_bytes)
        if peaks[-1] < limit:
            break
    assert min(peaks) < limit, "logits pile up: is a window kept longer than it is compared?"
    assert 1600 * bf16.vocabulary * 2 > limit, "the text is too short to tell"


def test_stop_is_heard_within_a_second(models):
    fp32, _, nf4, ids = models
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(Stopped):
        while True:
            scoring.score_text(nf4, ids, 512, 512, fp32, stop, quiet)
    stopped = time.monotonic()
    with pytest.raises(Stopped):
        scoring.score_text(nf4, ids, 512, 512, fp32, stop, quiet)
    assert time.monotonic() - stopped < 5


def test_not_a_number_is_named_not_averaged(models, monkeypatch):
    fp32, bf16, _, ids = models
    right = scoring.window_logits

    def broken(column, given, window, cancel):
        logits = right(column, given, window, cancel)
        if column is bf16 and window.start == 128:
            logits = logits.clone()
            logits[5, 100] = float("nan")
        return logits

    monkeypatch.setattr(scoring, "window_logits", broken)
    with pytest.raises(divergence.NotFinite) as caught:
        scoring.score_text(bf16, ids[:300], 128, 128, fp32, NEVER, quiet)
    assert (caught.value.side, caught.value.row) == ("variant", 133)
    problem = scoring.explain_not_finite(caught.value, "bf16", "the text")
    assert "bf16" in problem.problem and "token 134 of the text" in problem.problem


# ---------------------------------------------------------------- an answer


def test_an_answer_is_scored_the_way_it_was_decoded(models, tmp_path):
    """Greedy tokens of a column are, in its own scores, its first choice at every step."""
    from comparator.core.request import GenerationSettings
    from comparator.decoding.generate import Run, stream

    _, bf16, nf4, ids = models
    prompt = ids[:40]
    tokens = [t for t, _ in stream(bf16.model, prompt, GenerationSettings(max_new_tokens=12), NEVER, Run())]
    kept = scoring.keep_answer(bf16, prompt, tokens, tmp_path / "answer", NEVER, quiet)
    itself = scoring.score_answer(bf16, prompt, tokens, kept, str, NEVER, quiet)
    assert set(itself.kl) == {0.0} and set(itself.rank) == {0} and itself.first_difference is None
    assert itself.p == itself.reference_p
    assert scoring.score_answer(None, prompt, tokens, kept, str, NEVER, quiet) == itself

    other = scoring.score_answer(nf4, prompt, tokens, kept, str, NEVER, quiet)
    assert len(other.kl) == len(other.tokens) == len(other.top) == len(tokens) and min(other.kl) > 0
    steps = list(scoring.forced(nf4, prompt, tokens, NEVER))
    for step, token in enumerate(tokens):
        order = torch.argsort(steps[step], descending=True, stable=True).tolist()
        assert other.rank[step] == order.index(token)
        p = torch.softmax(steps[step].double(), -1)
        assert other.p[step] == pytest.approx(float(p[token]), rel=1e-9)
        assert [t.token for t in other.top[step]][0] == str(order[0])
    firsts = [int(s.argmax()) != t for s, t in zip(steps, tokens, strict=True)]
    assert other.first_difference == (firsts.index(True) if any(firsts) else None)


# ---------------------------------------------------------------- weights, and parts of a model


def test_weight_errors_by_layer(models):
    _, bf16, nf4, _ = models
    errors = weight_error.all_errors(nf4.weights(), bf16.weights(), NEVER)
    error = errors["model.layers.0.mlp.up_proj.weight"]
    import bitsandbytes.functional as functional

    module = nf4.model.model.layers[0].mlp.up_proj
    eye = torch.eye(module.in_features, dtype=torch.bfloat16)
    weight = module(eye).T.double()  # what the layer really multiplies with, by its own kernel
    original = bf16.model.model.layers[0].mlp.up_proj.weight.double()
    assert functional is not None
    assert error["relative"] == pytest.approx(
        float(((weight - original).norm() / original.norm()).detach()), rel=0.02
    )
    assert 0.05 < error["relative"] < 0.2 and 14 < error["sqnr_db"] < 26 and error["cosine"] > 0.98
    assert errors["model.norm.weight"]["relative"] == 0 and errors["model.norm.weight"]["sqnr_db"] is None


def test_one_part_at_a_time_leaves_the_model_as_it_was(models):
    _, bf16, nf4, ids = models
    names = ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    before = {n: bf16.model.get_submodule(n) for n in names}
    window = eval_text.Window(0, 60, 0)
    plain = scoring.window_logits(bf16, ids, window, NEVER)
    with pytest.raises(RuntimeError), bf16.with_layers_of(nf4, names):
        assert not torch.equal(scoring.window_logits(bf16, ids, window, NEVER), plain)
        raise RuntimeError
    assert all(bf16.model.get_submodule(n) is before[n] for n in names)
    assert torch.equal(scoring.window_logits(bf16, ids, window, NEVER), plain)
    grouped = sensitivity.parts([*names, "model.layers.0.mlp.up_proj"], "kind")
    assert grouped["mlp.up_proj"] == ["model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"]


# ---------------------------------------------------------------- whole comparisons


def run(engine, model, variants, **options):
    import comparator.api as api

    request = api.request("What is the capital of France?", variants, str(model), max_new_tokens=6, **options)
    from comparator.comparison.runner import compare

    return list(compare(request, engine=engine))


def test_a_comparison_measures_both_and_says_so(two_layers, engine, tmp_path):
    from comparator.core import document
    from comparator.core.events import Finished, Scoring

    text = tmp_path / "text.txt"
    text.write_text(eval_text.shipped()[:1500], encoding="utf-8")
    # Another worker's comparison may be running on the same cache, and a failed test's frames may hold a folder.
    ours = f"{os.getpid()}-*"
    before = set((engine.settings.cache_dir / "scores").glob(ours))
    events = run(engine, two_layers, ["bf16", "nf4"], eval_text=text, context=128, stride=64)
    comparison = events[-1].comparison
    bf16, nf4 = comparison.cells
    kinds = [type(e) for e in events if getattr(e, "cell", None) and e.cell.variant.method == "nf4"]
    assert Scoring in kinds and kinds[-1] is Finished and kinds.count(Finished) == 1
    assert bf16.fidelity.text["kl"]["max"] == 0.0
    assert nf4.fidelity.text["kl"]["mean"] > nf4.fidelity.text["floor"]["kl"]["mean"] >= 0
    for key in ("tokens", "ppl", "ppl_se", "reference_ppl", "kl_reverse", "delta_p", "top1", "top5_overlap"):
        assert nf4.fidelity.text[key] is not None
    assert (nf4.fidelity.text["context"], nf4.fidelity.text["stride"]) == (128, 64)
    assert nf4.fidelity.text["reference_ppl"] == bf16.fidelity.text["ppl"]
    assert nf4.fidelity.prompt.token_ids == bf16.token_ids
    assert all(r.error for r in nf4.layers), "each row of a quantized column has its weight error"
    assert document.loads(document.dumps(comparison)) == comparison
    left = set((engine.settings.cache_dir / "scores").glob(ours)) - before
    assert not left, "scores were left on the disk"


def test_scores_go_to_disk_when_two_do_not_fit_together(two_layers, engine, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(eval_text.shipped()[:800], encoding="utf-8")
    together = run(engine, two_layers, ["bf16", "nf4"], eval_text=text, context=64)[-1].comparison
    engine.unload()
    load = engine._pool.load

    def one_at_a_time(*args, **kwargs):
        slot, fresh = load(*args, **kwargs)
        for handle in [h for h in engine._pool.slots if h != slot.handle]:
            engine._pool.unload(handle)
        return slot, fresh

    monkeypatch.setattr(engine._pool, "load", one_at_a_time)
    apart = run(engine, two_layers, ["bf16", "nf4"], eval_text=text, context=64)[-1].comparison
    one, other = (c.cell("nf4") for c in (together, apart))
    assert one.fidelity == other.fidelity
    assert any("written to disk" in note for note in other.notes)
    assert not any("written to disk" in note for note in one.notes)


def test_a_reference_that_failed_refuses_fidelity_and_nothing_else(two_layers, engine, monkeypatch):
    from comparator.backends.full import FullPrecision

    load = FullPrecision.load

    def failing(self, checkpoint, variant, placement, progress):
        if variant.method == "fp32":
            raise UserError("fp32 is broken today.", "Use bf16.")
        return load(self, checkpoint, variant, placement, progress)

    monkeypatch.setattr(FullPrecision, "load", failing)
    engine.unload()
    fp32, bf16 = run(engine, two_layers, ["fp32", "bf16"], reference="fp32")[-1].comparison.cells
    assert fp32.status == "failed" and bf16.status == "ok" and bf16.token_ids
    assert "fp32 is broken today" in bf16.fidelity.refused
    # Without a choice of its own the most precise column that worked is the reference.
    comparison = run(engine, two_layers, ["fp32", "bf16", "nf4"])[-1].comparison
    assert comparison.reference.variant == "bf16" and comparison.cell("nf4").fidelity.prompt


def test_not_a_number_refuses_one_column(two_layers, engine, monkeypatch):
    right = scoring.forced

    def broken(column, prompt_ids, token_ids, cancel):
        quantized = column.variant.method == "nf4"
        for step, logits in enumerate(right(column, prompt_ids, token_ids, cancel)):
            yield logits * float("nan") if quantized and step == 2 else logits

    monkeypatch.setattr(scoring, "forced", broken)
    bf16, nf4 = run(engine, two_layers, ["bf16", "nf4"])[-1].comparison.cells
    assert nf4.status == "ok" and nf4.fidelity.prompt is None
    assert "nf4" in nf4.fidelity.refused and "token 3 of the answer" in nf4.fidelity.refused
    assert bf16.fidelity.prompt is not None


def test_stop_keeps_what_was_finished(two_layers, engine, tmp_path):
    from comparator import api
    from comparator.comparison.runner import compare
    from comparator.core.events import Finished, Scoring

    stop = threading.Event()
    text = tmp_path / "text.txt"
    text.write_text(eval_text.shipped()[:4000], encoding="utf-8")
    request = api.request(
        "Hello", ["bf16", "nf4"], str(two_layers), max_new_tokens=4, eval_text=text, context=64
    )
    events, at = [], None
    for event in compare(request, engine=engine, cancel=stop):
        events.append(event)
        if isinstance(event, Scoring) and event.cell.variant.method == "nf4" and "text" in event.message:
            stop.set()
            at = at or time.monotonic()
    assert time.monotonic() - at < 8
    bf16, nf4 = events[-1].comparison.cells
    assert bf16.fidelity.text, bf16.fidelity.refused
    assert nf4.fidelity.prompt and nf4.fidelity.text is None, nf4.fidelity.refused
    assert "Stopped" in nf4.fidelity.refused and nf4.text == next(
        e.result.text for e in events if isinstance(e, Finished) and e.result.variant == "nf4"
    )


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "said"),
    [("too short", "tokens; the context is 512"), ("  \n", "empty"), ("\0\x01PNG\x02" * 50, "binary")],
)
def test_a_text_that_will_not_do_is_refused_before_anything_runs(two_layers, engine, text, said):
    import comparator.api as api
    from comparator.comparison.runner import compare
    from comparator.core.events import Generated
    from comparator.core.request import Request

    plain = api.request("Hello", ["bf16", "nf4"], str(two_layers))
    request = Request(**{**vars(plain), "fidelity": "text", "evaluation": EvalSettings(text, "mine")})
    seen = []
    with pytest.raises(UserError, match=said):
        for event in compare(request, engine=engine):
            seen.append(event)
    assert not any(isinstance(e, Generated) for e in seen)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (EvalSettings(context=1), "context is 1"),
        (EvalSettings(stride=0), "stride is 0"),
        (EvalSettings(context=64, stride=65), "longer than its context"),
        (EvalSettings(context=9000), "the model's is 8,192"),
    ],
)
def test_settings_out_of_range(given, said):
    with pytest.raises(UserError, match=said):
        eval_text.check(given, 8192)


def test_the_shipped_text_is_text_of_some_length():
    eval_text.check_text(eval_text.shipped(), "ours")
    assert len(eval_text.shipped().split()) > 2000
