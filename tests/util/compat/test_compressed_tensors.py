"""compressed-tensors' bars are where comparator/util/compat/compressed_tensors.py turns them off."""

from __future__ import annotations

import pytest

from comparator.util.compat import compressed_tensors as compat

pytest.importorskip("compressed_tensors")


def test_bars_are_off_while_it_is_open(capfd):
    from compressed_tensors.compressors.model_compressors import model_compressor
    from compressed_tensors.quantization.lifecycle import apply

    for module in (apply, model_compressor):
        own = module.tqdm
        with compat.without_bars():
            assert list(module.tqdm([1, 2], desc="loud", disable=False)) == [1, 2]
        assert module.tqdm is own
    assert "loud" not in capfd.readouterr().err
