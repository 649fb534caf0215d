"""GPTQ without a model: its notation, which kernels can run what, packed words, the code to copy."""

from __future__ import annotations

import pytest

from comparator.backends import backend_for, resolve
from comparator.backends.base import Placement
from comparator.backends.gptq.kernels import KERNELS
from comparator.backends.gptqmodel_layers import unpack
from comparator.backends.gptqmodel_layers.kernels import Packed
from comparator.core.errors import UserError

PROMPT = "The capital of France is"
GPTQ = backend_for(resolve("gptq"))


@pytest.mark.parametrize(
    ("kernel", "packed", "device", "words"),
    [
        ("exllama_v2", Packed(4, 64, False, True), "cpu", "NVIDIA GPU"),
        ("torch_aten", Packed(8, 64, False, True), "cpu", "4 bits"),
        ("torch_aten", Packed(4, -1, False, True), "cpu", "groups of 16"),
        ("torch_aten", Packed(4, 64, False, True), "cuda:0", "CPU only"),
        ("exllama_v2", Packed(3, 64, False, True), "cuda:0", "4 bits"),
        ("triton", Packed(3, 64, False, True), "cuda:0", "2, 4 or 8 bits"),
        ("triton", Packed(4, 64, False, True, sizes=frozenset({(72, 64)})), "cuda:0", "72 × 64"),
        ("marlin", Packed(4, 64, False, False), "cuda:0", "symmetric"),
    ],
)
def test_limits_are_checked_before_loading(kernel, packed, device, words):
    with pytest.raises(UserError) as caught:
        KERNELS.choose(kernel, packed, device)
    assert words in caught.value.problem and kernel in caught.value.problem


def test_exllama_wants_everything_on_the_gpu():
    with pytest.raises(UserError) as caught:
        KERNELS.choose("exllama_v2", Packed(4, 64, False, True), "cuda:0", spread=True)
    assert "max_memory" in caught.value.problem


@pytest.mark.parametrize(
    ("packed", "expected"),
    [
        (Packed(4, 64, False, True), "torch_aten"),
        (Packed(4, -1, False, True), "torch"),
        (Packed(8, 64, False, True), "torch"),
        (Packed(3, 32, True, False), "torch"),
    ],
)
def test_auto_on_a_cpu_takes_the_fastest_that_is_exact(packed, expected):
    assert KERNELS.choose("auto", packed, "cpu").name == expected


def test_the_list_of_kernels_says_what_is_possible_here():
    lines = KERNELS.possible()
    assert len(lines) == len(KERNELS.kernels)
    torch_line = next(line for line in lines if line.startswith("kernel=torch:"))
    assert "possible here" in torch_line


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("gptq:4bit", "gptq"),
        ("gptq:g64", "gptq:4bit,g64"),
        ("gptq:g64,4bit", "gptq:4bit,g64"),
        ("gptq:8bit", "gptq:8bit"),
        ("gptq:sym=true,damp=0.1,kernel=auto,dtype=fp16", "gptq"),
        ("gptq:g-1,desc_act,3bit", "gptq:3bit,desc_act,g-1"),
        ("gptq@me/repo@main:4bit,kernel=torch", "gptq@me/repo@main:4bit,kernel=torch"),
    ],
)
def test_one_notation_means_one_thing(written, canonical):
    assert resolve(written).notation == canonical
    assert resolve(canonical) == resolve(written)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("gptq:5bit", ["5bit", "2, 3, 4, 8"]),
        ("gptq:g48", ["g48", "32, 64, 128"]),
        ("gptq:cal=my.txt", ["cal=my.txt", "--calibration"]),
        ("gptq:3bit,kernel=exllama_v2", ["exllama_v2", "4 bits"]),
        ("gptq:damp=2", ["damp=2"]),
        ("gptq:kernel=fastest", ["fastest", "torch_aten"]),
    ],
)
def test_a_wrong_option_is_named_with_what_is_possible(written, words):
    with pytest.raises(UserError) as caught:
        resolve(written)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_unpacking_reads_words_of_any_width():
    import torch

    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 2**bits, (5, 64))
        stream = [sum(int(c) << (bits * k) for k, c in enumerate(row)) for row in codes]
        words = [[(s >> (32 * i)) & 0xFFFFFFFF for i in range(2 * bits)] for s in stream]
        packed = torch.tensor(words, dtype=torch.int64).to(torch.int32)
        assert torch.equal(unpack.codes(packed, bits, 64), codes.int()), f"{bits} bits"


def test_the_code_points_at_what_quantize_writes():
    variant = resolve("gptq:g64,kernel=torch")
    imports, setup, arguments = GPTQ.code(variant, Placement("cpu"))
    assert imports == ["from transformers import GPTQConfig"]
    assert setup == ["quantization = GPTQConfig(bits=4, backend='gptq_torch')"]
    assert "dtype=torch.float16" in arguments
    comment = "\n".join(GPTQ.code_comment(variant, "a b\nimport os"))
    assert "quantize" in comment and "--output" in comment
    assert all(line.startswith("#") for line in comment.splitlines()), (
        "a name with a line break stays in its comment"
    )
    assert GPTQ.code_weights(resolve("gptq@me/repo")) == "'me/repo'"
