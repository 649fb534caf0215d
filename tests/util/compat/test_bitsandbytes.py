"""What is changed in bitsandbytes, and in its integration, is where comparator/util/compat/bitsandbytes.py expects it."""

from __future__ import annotations

import inspect

import pytest

from comparator.util.compat import bitsandbytes as compat

bnb = pytest.importorskip("bitsandbytes")


def test_int8_weights_are_converted_there():
    from transformers.integrations.bitsandbytes import Bnb8bitQuantize

    own = Bnb8bitQuantize.convert
    taken = list(inspect.signature(own).parameters)
    assert taken[:2] == ["self", "input_dict"] and {"full_layer_name", "model"} <= set(taken), (
        "transformers quantizes int8 weights in another way: change int8_on_device"
    )
    assert list(inspect.signature(bnb.nn.Int8Params._quantize).parameters) == ["self", "device"]
    with compat.int8_on_device():
        assert Bnb8bitQuantize.convert is not own
    assert Bnb8bitQuantize.convert is own


def test_the_packed_format_of_the_cpu_is_a_mark_on_the_quant_state():
    from bitsandbytes import functional

    source = inspect.getsource(functional) + inspect.getsource(bnb.nn.Linear4bit)
    assert "quant_state.packing_format_for_cpu = True" in source
    assert '"packing_format_for_cpu", False' in source, (
        "state_dict() asks for another mark: change keeping_packed"
    )


def test_an_odd_layer_is_kept_from_the_packed_kernel():
    import torch

    layers = torch.nn.ModuleDict({"even": bnb.nn.Linear4bit(64, 32), "odd": bnb.nn.Linear4bit(64, 33)})
    assert all(hasattr(layer, "support_avx512bf16_for_cpu") for layer in layers.values()), (
        "bitsandbytes chooses the packed kernel in another way: change leave_unsupported_layers"
    )
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = True
    notes = compat.leave_unsupported_layers(layers)
    assert len(notes) == 1 and "odd" in notes[0]
    assert [layer.support_avx512bf16_for_cpu for layer in layers.values()] == [True, False]
