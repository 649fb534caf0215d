"""One row times stored codes, against the library's own unpacked weight; and which layers are decoded with it."""

from __future__ import annotations

import pytest
import tiny_models

from comparator.backends import backend_for, owner, resolve, row_matmul
from comparator.backends.base import Placement
from comparator.sources import open_checkpoint

READ_AS_STORED = [
    "torchao", "torchao:group=tensor", "torchao:group=32", "torchao:scheme=fp8", "torchao:group=tensor,scheme=fp8",
    "torchao:group=64,scheme=fp8", "torchao:scheme=intx4", "hqq:8bit", "hqq:kernel=unpack", "hqq:2bit,g16",
]  # fmt: skip
LEFT = ["torchao:scheme=int8dyn", "hqq", "hqq:3bit"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pytest.importorskip("hqq", reason="hqq is in requirements-formats.txt, which `make test` installs")
    folder = tmp_path_factory.mktemp("row") / "model"
    tiny_models.save(folder, "qwen2", hidden_size=128, intermediate_size=256, dtype="bfloat16")  # with biases
    return open_checkpoint(str(folder))


def load(checkpoint, notation: str, device: str = "cpu"):
    backend = backend_for(resolve(notation))
    variant = backend.complete(resolve(notation), checkpoint)
    return backend.load(checkpoint, variant, Placement(device), lambda *_: None).model


def check_rows(model, device: str) -> None:
    """Each layer's form for a capture against the weight that the library unpacks, in float64."""
    import torch

    torch.manual_seed(0)
    checked = 0
    for name, module in model.named_modules():
        if (backend := owner(module)) is None:
            continue
        forward = backend.capture_forward(module)
        assert forward is not None and backend.on_parallel_streams(module), name
        assert backend.capture_note(module) == row_matmul.NOTE
        x = torch.randn(1, 1, module.in_features, dtype=torch.bfloat16, device=device)
        with torch.inference_mode():
            out, own = forward(x), module(x)
            wanted = x.double() @ backend.dequantize(module).double().t()
        wanted = wanted if module.bias is None else wanted + module.bias.double()
        assert (out.dtype, out.shape) == (own.dtype, own.shape)
        apart = float((out.double() - wanted).norm() / wanted.norm())
        assert apart < 0.005, (
            f"{name}: {apart:.1%} from the unpacked weight: codes, scales or planes are misread"
        )
        checked += 1
    assert checked == 14


@pytest.mark.parametrize("notation", READ_AS_STORED)
def test_it_is_the_unpacked_matmul(checkpoint, notation):
    check_rows(load(checkpoint, notation), "cpu")


@pytest.mark.parametrize("notation", LEFT)
def test_other_layers_keep_their_own(checkpoint, notation):
    model = load(checkpoint, notation)
    for module in model.modules():
        if (backend := owner(module)) is not None and (
            forward := backend.capture_forward(module)
        ) is not None:
            assert notation == "torchao:scheme=int8dyn" and backend.capture_note(module) != row_matmul.NOTE, (
                forward
            )


def test_a_step_is_captured_checked_and_noted(checkpoint):
    """As on CUDA, but for the graph itself."""
    from comparator.decoding.planner import record
    from comparator.decoding.static_state import StaticDecodeState

    model = load(checkpoint, "torchao")
    _, notes, check = record(model, StaticDecodeState(model, 64), [5, 6, 7, 8], compiled=False, greedy=True)
    assert row_matmul.NOTE in notes
    assert check.wrong is None and check.layers < 0.01, check


def test_shapes_that_it_does_not_take():
    import torch

    def codes(outputs, inputs, groups, dtype=torch.uint8):
        return row_matmul.Codes(torch.zeros(outputs, inputs, dtype=dtype), torch.ones(outputs, groups))

    assert row_matmul.runs_on(codes(8, 96, 1)) and row_matmul.runs_on(codes(8, 96, 3))
    assert not row_matmul.runs_on(codes(8, 96, 2)), "groups of 48"
    assert not row_matmul.runs_on(codes(8, 100, 1)), "rows that are not multiples of 16 bytes"
    with pytest.raises(ValueError, match="one row of 96"):
        row_matmul.one_row(torch.zeros(2, 96), codes(8, 96, 1))


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("notation", READ_AS_STORED)
def test_the_kernel_gives_the_same(gpu, checkpoint, notation):
    check_rows(load(checkpoint, notation, gpu), gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 14336), (14336, 4096), (1000, 576)])
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (8, 0), (4, 0), (2, 0)])
def test_the_kernel_is_the_formula(gpu, shape, bits, groups):
    import torch

    torch.manual_seed(0)
    outputs, inputs = shape
    stored = torch.randint(0, 256, (outputs * bits // 8, inputs), dtype=torch.uint8, device=gpu)
    scale = torch.rand(outputs, groups or inputs // 64, device=gpu)
    zero = torch.rand_like(scale) * 2**bits
    weight = row_matmul.Codes(stored, scale, zero, bits)
    x = torch.randn(inputs, dtype=torch.bfloat16, device=gpu)
    wanted = row_matmul.plain(x.double(), weight).double()
    apart = (row_matmul.one_row(x, weight).double() - wanted).norm() / wanted.norm()
    assert float(apart) < 0.005
