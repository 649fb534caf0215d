"""How a step is compiled. The kernels themselves are a GPU's; what decides about them is tested here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from decode_models import GREEDY, recorded_for, tiny, tokens

from comparator.decoding import compile as decoding_compile


@pytest.mark.parametrize(
    ("rows", "elements", "expected"),
    [(1, 4096, True), (1, 16384, True), (1, 16385, False), (4096, 4096, False), (2, 576, False)],
)
def test_the_norm_of_one_row_is_one_pass(rows, elements, expected):
    import sympy

    given = SimpleNamespace(numel=sympy.Integer(rows), reduction_numel=sympy.Integer(elements))
    assert decoding_compile.one_block(given) is expected


def test_sizes_that_are_not_known_are_the_compilers_business():
    import sympy

    assert not decoding_compile.one_block(SimpleNamespace(numel=1, reduction_numel=sympy.Symbol("s")))
    assert not decoding_compile.one_block(SimpleNamespace())


def test_a_norm_of_one_row_is_asked_for():
    from torch._inductor.virtualized import V

    with decoding_compile.one_pass_norms():
        assert V.choices.should_use_persistent_reduction(
            SimpleNamespace(numel=1, reduction_numel=4096), False
        )


def test_a_compiled_step_decodes_the_eager_tokens():
    """Compiled for a CPU, so without the kernels; the rest is what a GPU's step goes through."""
    model = tiny("Llama")
    recorded, _, check = recorded_for(model, compiled=True)
    assert recorded.path == "compiled-cuda-graph" and check.first_difference is None
    assert tokens(model, GREEDY, recorded)[0] == tokens(model, GREEDY)[0]
