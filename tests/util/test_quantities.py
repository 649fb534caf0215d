"""Numbers as people type them, and as a stranger sends them."""

from __future__ import annotations

import time

import pytest

from comparator.core.errors import UserError
from comparator.util import quantities


def test_numbers_as_people_type_them():
    assert quantities.several("16, 1,4k,1") == (1, 16, 4096)
    assert (
        quantities.tokens("32k") == 32_768
        and quantities.tokens("1_000") == 1000
        and quantities.tokens(8) == 8
    )
    assert quantities.seconds("50ms") == 0.05


@pytest.mark.parametrize("read", [quantities.several, quantities.tokens, quantities.seconds])
@pytest.mark.parametrize("text", ["1," * 4_000_000, ["1"] * 1_000_000, {"1": 1}])
def test_megabytes_in_a_field_cost_nothing(read, text):
    """Four million numbers stopped every thread for twelve seconds, and were read for three minutes."""
    began_s = time.process_time()
    with pytest.raises(UserError):
        read(text)
    assert time.process_time() - began_s < 0.5
