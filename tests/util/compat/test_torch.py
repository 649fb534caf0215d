"""The private parts of PyTorch are where comparator/util/compat/torch.py expects them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from comparator.util.compat import torch as compat


def test_cublas_workspaces():
    compat.clear_cublas_workspaces()
    assert torch.version.cuda is None or hasattr(torch._C, "_cuda_clearCublasWorkspaces"), (
        "unloading a model no longer frees cuBLAS's workspaces: torch names the call otherwise"
    )


def test_a_subclass_shows_what_it_wraps():
    from torch.testing._internal.two_tensor import TwoTensor

    a, b = torch.ones(2), torch.zeros(2)
    inner = compat.wrapped_tensors(TwoTensor(a, b))
    assert [id(t) for t in inner] == [id(a), id(b)]
    assert compat.wrapped_tensors(torch.nn.Parameter(a)) is None


def test_what_a_subclass_wraps_can_be_replaced():
    from torch.testing._internal.two_tensor import TwoTensor

    a, b = torch.ones(2), torch.zeros(2)
    nested = TwoTensor(TwoTensor(a, b), TwoTensor(b, a))
    assert [id(t) for t in compat.plain_tensors(nested)] == [id(a), id(b), id(b), id(a)]
    compat.rewrap(nested, lambda inner: inner.clone())
    copies = compat.plain_tensors(nested)
    assert all(copy is not t and torch.equal(copy, t) for copy, t in zip(copies, (a, b, b, a), strict=True))
    assert compat.plain_tensors(a) == [a]


def test_the_packed_4_bit_matmul():
    """(code − 8) · scale + zero, groups of 32."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (32, 64), dtype=torch.uint8)
    both = torch.rand(2, 32, 2).bfloat16()
    x = torch.randn(3, 64).bfloat16()
    scale, zero = (both[..., i].t().repeat_interleave(32, 1).double() for i in (0, 1))
    wanted = x.double() @ ((codes.double() - 8) * scale + zero).t()
    out = compat.int4_matmul(x, compat.int4_pack(codes), 32, both).double()
    assert float((out - wanted).norm() / wanted.norm()) < 0.01
    assert [compat.int4_inner_tiles(n) for n in (4096, 576, 96, 48)] == [8, 4, 2, 0]


def test_the_product_of_int8_is_int32():
    a = torch.full((32, 64), 127, dtype=torch.int8)
    assert torch.equal(compat.int8_matmul(a, a.t()), torch.full((32, 32), 64 * 127**2, dtype=torch.int32))


def test_buffers_that_are_saved():
    module = torch.nn.Module()
    module.register_buffer("saved", torch.ones(1))
    module.register_buffer("computed", torch.ones(1), persistent=False)
    module.register_buffer("empty", None)
    assert [name for name, _ in compat.persistent_buffers(module)] == ["saved"] == list(module.state_dict())


def test_a_write_is_counted():
    tensor = torch.zeros(2)
    before = compat.version(tensor)
    tensor.add_(1)
    assert compat.version(tensor) > before, "an adapter that writes into shared weights would not be noticed"
    with torch.inference_mode():
        assert compat.version(torch.zeros(2)) == 0


def test_the_4_bit_kernel_takes_these_arguments():
    schema = torch.ops.aten._weight_int4pack_mm_for_cpu.default._schema
    assert [(a.name, str(a.type)) for a in schema.arguments] == [
        ("self", "Tensor"), ("mat2", "Tensor"), ("qGroupSize", "int"), ("qScaleAndZeros", "Tensor"),
    ], "PyTorch's 4-bit CPU kernel is called otherwise: change int4_matmul"  # fmt: skip


def test_compiler_options_hold_inside():
    import torch._dynamo
    from torch._inductor import config

    names = ("emulate_precision_casts", "coordinate_descent_tuning", "combo_kernels")
    before = [getattr(config, name) for name in names]
    with compat.compiler_options(**dict.fromkeys(names, True)):
        assert all(getattr(config, name) is True for name in names)
        assert torch._dynamo.config.recompile_limit == 256
    assert [getattr(config, name) for name in names] == before


def test_inductor_asks_and_is_itself_again_afterwards():
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    row = SimpleNamespace(numel=1, reduction_numel=4096)
    own = InductorChoices.should_use_persistent_reduction
    with compat.persistent_reductions(lambda features: features is row):
        assert type(V.choices) is not InductorChoices, "this release of torch is asked in another way"
        assert V.choices.should_use_persistent_reduction(row, False)
    assert type(V.choices) is InductorChoices
    assert InductorChoices.should_use_persistent_reduction is own
