"""What the tests of torchao share: models of plain transformers, the prompt's ids, the checkpoint."""

from __future__ import annotations

import threading

import pytest
from torchao_models import ON_CPU, PROMPT, plain

from comparator.sources import open_checkpoint


@pytest.fixture(scope="module")
def models(two_layers):
    """By notation: the model of plain transformers, loaded when it is asked for."""

    class Models(dict):
        def __missing__(self, notation: str):
            self[notation] = plain(two_layers, *ON_CPU[notation][:2])
            return self[notation]

    return Models()


@pytest.fixture(scope="module")
def ids(two_layers, own_engine) -> tuple[int, ...]:
    own_engine.open(str(two_layers), threading.Event())
    return tuple(own_engine.encode(str(two_layers), PROMPT, None, False).token_ids)


@pytest.fixture
def checkpoint(two_layers):
    return open_checkpoint(str(two_layers))
