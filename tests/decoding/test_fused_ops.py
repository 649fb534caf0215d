"""The fused kernels: plain torch against transformers' own code; on a GPU, the kernels against plain torch."""

from __future__ import annotations

import pytest
from decode_models import FULL, GREEDY, filled, recorded_for, tiny, tokens

SHAPES = [(1, 9, 3, 64), (2, 4, 4, 80), (1, 32, 8, 128), (1, 8, 1, 256), (3, 6, 2, 16)]


def found_in(model):
    import torch

    from comparator.decoding import fused_ops

    with torch.inference_mode():
        return fused_ops.find(model, filled(model))


def test_the_norm_is_transformers_to_the_bit():
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from comparator.decoding import reference_ops

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        norm = LlamaRMSNorm(96, eps=1e-5).to(dtype)
        torch.nn.init.normal_(norm.weight)
        x = torch.randn(1, 3, 96).to(dtype) * 7
        assert torch.equal(reference_ops.rms_norm(x, norm.weight, 1e-5), norm(x))


def test_the_rotation_is_transformers_to_the_bit():
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from comparator.decoding import reference_ops

    for dtype in (torch.float32, torch.bfloat16):
        q, k = torch.randn(2, 4, 1, 32).to(dtype), torch.randn(2, 2, 1, 32).to(dtype)
        cos, sin = torch.randn(1, 1, 32).to(dtype), torch.randn(1, 1, 32).to(dtype)
        for ours, own in zip(
            reference_ops.rotate(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True
        ):
            assert torch.equal(ours, own)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_pytorchs(shape):
    import torch

    from comparator.decoding import reference_ops

    batch, heads, key_heads, size = shape
    query = torch.randn(batch, heads, 1, size)
    keys, values = torch.randn(2, batch, key_heads, 256, size)
    for last in (0, 5, 255):
        got = reference_ops.attend(query, keys, values, torch.tensor([[last]]), 0.3)
        seen = (t[:, :, : last + 1].repeat_interleave(heads // key_heads, 1) for t in (keys, values))
        own = torch.nn.functional.scaled_dot_product_attention(query, *seen, scale=0.3).transpose(1, 2)
        assert torch.allclose(got, own, atol=1e-5), (
            "slots after the position took part, or heads were mixed up"
        )


@pytest.mark.parametrize("name", FULL)
def test_what_is_fused_of_each_architecture(name):
    fused = found_in(tiny(name))
    other_norm = ("Gemma", "Phi", "GPTNeoX", "GPT2")  # (1 + weight), or a layer norm
    assert bool(fused.norms) == (name not in other_norm)
    assert bool(fused.rotations) == (name not in ("GPTNeoX", "GPT2"))
    assert len(fused.attentions) == 1


def test_what_is_not_the_same_is_not_fused(monkeypatch):
    """A kernel that is a little wrong (here: one that forgets epsilon's place) has to be seen on the way in."""
    from comparator.decoding import reference_ops

    own = reference_ops.rms_norm
    monkeypatch.setattr(reference_ops, "rms_norm", lambda x, weight, epsilon: own(x, weight, epsilon) * 1.01)
    monkeypatch.setattr(reference_ops, "rotate", lambda q, k, cos, sin: (k, q))
    fused = found_in(tiny("Llama"))
    assert not fused.norms and not fused.rotations and fused.attentions
    assert "compute attention;" in fused.notes[0]


def test_a_kernel_that_fails_is_done_without(monkeypatch):
    from comparator.decoding import reference_ops

    def broken(*_):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(reference_ops, "rms_norm", broken)
    _, notes, check = recorded_for(tiny("Llama"))
    assert check.first_difference is None and "compute the rotary embedding;" in notes[0]


def test_everything_is_put_back():
    from transformers.models.llama import modeling_llama

    from comparator.decoding import fused_ops

    model = tiny("Llama")
    table = modeling_llama.ALL_ATTENTION_FUNCTIONS
    before = modeling_llama.apply_rotary_pos_emb, table["sdpa"], dict(table._local_mapping)
    found = found_in(model)
    with fused_ops.applied(found, filled(model)):
        assert table["sdpa"] is not before[1] and "forward" in vars(model.model.norm)
    assert (modeling_llama.apply_rotary_pos_emb, table["sdpa"], table._local_mapping) == before
    assert not any("forward" in vars(m) for m in model.modules())


def test_attention_stays_the_librarys_where_the_cache_is_short():
    """With the norm and the rotation alone a recorded step gives eager's bits; attention in another order does not."""
    from comparator.decoding.fused_ops import EXACT_SLOTS, Fused

    whole = Fused(("norm",), ("rotation",), ("attention",))
    assert whole.of(EXACT_SLOTS, compiled=False) == Fused(("norm",), ("rotation",))
    assert whole.of(EXACT_SLOTS + 1, compiled=False) == whole
    assert whole.of(256, compiled=True) == Fused(attentions=("attention",))
    assert whole.of(256, compiled=False, exact=False) == whole, (
        "eager repeats no bits, so there are none to keep"
    )


def test_exllama_repeats_no_bits():
    import torch

    from comparator.decoding.fused_ops import repeats

    model = tiny("Llama")
    assert repeats(model)
    exllama = pytest.importorskip("gptqmodel.nn_modules.qlinear.exllamav2").ExllamaV2Linear
    layer = exllama.__new__(exllama)  # there is no GPU to make one for
    torch.nn.Module.__init__(layer)
    layer.bits = 4
    model.model.layers[1].mlp.up_proj = layer
    assert not repeats(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_column_says_so(dtype):
    import torch

    _, notes, check = recorded_for(tiny("Llama").to(getattr(torch, dtype)))
    assert any("compute norms and the rotary embedding;" in n for n in notes)
    assert check.first_difference is None
    _, notes, _ = recorded_for(tiny("GPT2"))
    assert not notes, "nothing of GPT-2 is fused at this length"


def test_a_long_cache_decodes_the_eager_tokens_too(monkeypatch):
    """The whole step with attention as well, which short prompts do not take."""
    from comparator.decoding import fused_ops

    monkeypatch.setattr(fused_ops, "EXACT_SLOTS", 0)
    for name in FULL:
        recorded, notes, check = recorded_for(tiny(name))
        assert any("attention" in n for n in notes) and check.distance < 1e-4, name
        assert tokens(tiny(name), GREEDY, recorded)[0] == tokens(tiny(name), GREEDY)[0]


# ---------------------------------------------------------------- on a GPU


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def dtype(request):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    return getattr(torch, request.param)


def apart(one, other):
    from comparator.decoding.fused_ops import _distance

    return _distance(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 576), (9, 64), (1, 4096), (2, 14336), (3, 100)])
def test_norm_kernel(dtype, shape):
    import torch

    from comparator.decoding import fused_ops, reference_ops, triton_fused

    x, weight = torch.randn(shape, device="cuda").to(dtype), torch.randn(shape[1], device="cuda").to(dtype)
    got, own = triton_fused.launch_rms_norm(x, weight, 1e-5), reference_ops.rms_norm(x, weight, 1e-5)
    assert apart(got, own) < (fused_ops.LIMIT_32 if dtype == torch.float32 else fused_ops.LIMIT)["norm"]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_kernel(dtype, shape):
    import torch

    from comparator.decoding import reference_ops, triton_fused

    batch, heads, key_heads, size = shape
    q = torch.randn(batch, 1, heads, size, device="cuda").to(dtype).transpose(1, 2)
    k = torch.randn(batch, 1, key_heads, size, device="cuda").to(dtype).transpose(1, 2)
    cos, sin = torch.randn(2, 1, 1, size, device="cuda").to(dtype)
    own = reference_ops.rotate(q, k, cos, sin)
    assert apart(triton_fused.launch_rotate(q, k, cos, sin), own) < 1e-6, (
        "rounded elsewhere than eager rounds"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("capacity", "last"), [(256, 0), (256, 255), (512, 300), (1024, 64), (8192, 5000)])
def test_attention_kernel(dtype, shape, capacity, last):
    import torch

    from comparator.decoding import fused_ops, reference_ops, triton_fused

    batch, heads, key_heads, size = shape
    query = torch.randn(batch, heads, 1, size, device="cuda").to(dtype)
    keys, values = torch.randn(2, batch, key_heads, capacity, size, device="cuda").to(dtype)
    position = torch.full((1, 1), last, device="cuda")
    got = triton_fused.launch_attend(query, keys, values, position, size**-0.5)
    own = reference_ops.attend(query, keys, values, position, size**-0.5)
    assert apart(got, own) < (fused_ops.LIMIT_32 if dtype == torch.float32 else fused_ops.LIMIT)["attention"]
