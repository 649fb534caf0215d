"""Several prompts at once: the same greedy tokens as one by one, or the prompt is named."""

from __future__ import annotations

import threading

import pytest

from comparator.backends import resolve
from comparator.core.messages import LoadRequest
from comparator.core.request import GenerationSettings
from comparator.core.settings import Settings
from comparator.engine.local import LocalEngine
from comparator.fidelity.batch_tasks import DecodeBatch, ScoreBatch
from comparator.fidelity.tasks import ColumnRef, KeepAnswer, ScoreAnswer

PROMPTS = ["Hello", "What is the capital of France? Answer in one word.", "Count to three: one,"]


@pytest.mark.parametrize("variant", ["fp32", "nf4"])
def test_rows_of_unlike_length_are_answered_and_scored_as_one_by_one(
    two_layers, tmp_path, variant: str
) -> None:
    engine, cancel, model = LocalEngine(Settings(max_new_tokens=64)), threading.Event(), str(two_layers)
    settings = GenerationSettings(max_new_tokens=6)
    engine.open(model, cancel)
    prompts = tuple(engine.encode(model, text, None, None) for text in PROMPTS)
    loaded = engine.load(LoadRequest(model, resolve(variant)), cancel)
    column = ColumnRef(loaded.handle, None, variant)
    alone = [engine.generate(loaded.handle, prompt, settings, cancel) for prompt in prompts]
    paths = tuple(f"{tmp_path}/{n}" for n in range(len(prompts)))
    batch = engine.score(DecodeBatch(column, prompts, settings, paths), cancel)
    for text, one, many in zip(PROMPTS, alone, batch, strict=True):
        if one.token_ids != many.token_ids:
            assert many.near_tie is not None, f"“{text}” is answered otherwise in a batch, and is not named"
            continue
        assert (one.text, one.finish_reason) == (many.text, many.finish_reason)
    tokens = tuple(answer.token_ids for answer in batch)
    kept = tuple(
        engine.score(KeepAnswer(column, p.token_ids, t, f"{tmp_path}/one{n}"), cancel)
        for n, (p, t) in enumerate(zip(prompts, tokens, strict=True))
    )
    scores = engine.score(ScoreBatch(column, prompts, tokens, kept, settings), cancel)
    for prompt, answer, reference, score in zip(prompts, tokens, kept, scores, strict=True):
        expected = engine.score(ScoreAnswer(column, "itself", prompt, answer, reference), cancel)
        assert score.compared == len(answer) and score.kl < 0.01, (
            "a row sees the padding, or another row's tokens"
        )
        assert abs(score.kl - sum(expected.kl) / len(expected.kl)) < 0.01
    engine.unload()
