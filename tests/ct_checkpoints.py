"""Weights quantized and packed as the formats of compressed-tensors describe it, without the library."""

from __future__ import annotations

import stored_formats as formats


def arguments(bits: int, kind: str, strategy: str, group=None, dynamic=False, symmetric=True) -> dict:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group, "dynamic": dynamic,
            "symmetric": symmetric}  # fmt: skip


def quantization(how: str, weights: dict, inputs: dict | None = None, targets=("Linear",)) -> dict:
    group = {"targets": list(targets), "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": how, "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": {"group_0": group}}  # fmt: skip


def words(codes, bits: int):
    """Codes (rows, columns) from 0 to 2^bits - 1 → int32, one after the other from the lowest bit of each word on."""
    import numpy as np
    import torch

    flat = codes.numpy().astype(np.uint8)
    one_by_one = np.unpackbits(flat[..., None], axis=-1, bitorder="little")[..., :bits].reshape(len(flat), -1)
    padded = np.pad(one_by_one, ((0, 0), (0, -one_by_one.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=-1, bitorder="little").view(np.int32).copy())


class Packer:
    """Packs linear layers, and keeps what the stored numbers mean: `meant`, in bf16."""

    def __init__(self):
        self.meant: dict = {}

    def __call__(self, name, weight):
        if not formats.is_linear(name):
            self.meant[name] = weight
            return None
        stored, self.meant[name] = self.layer(weight.float(), name.removesuffix("weight"))
        return stored


class Groups(Packer):
    """Integers in groups of 64, with or without zero points."""

    def __init__(self, bits=4, symmetric=True):
        super().__init__()
        self.bits, self.symmetric = bits, symmetric

    def layer(self, weight, stem):
        import torch

        outputs, inputs = weight.shape
        blocks, most = weight.reshape(outputs, inputs // 64, 64), 2**self.bits - 1
        low, high = blocks.amin(-1), blocks.amax(-1)
        half = 2 ** (self.bits - 1)
        scale = ((high - low) / most if not self.symmetric else blocks.abs().amax(-1) / (half - 1)).bfloat16()
        zero = (
            torch.full_like(scale, half) if self.symmetric else (-low / scale.float()).round().clamp(0, most)
        )
        codes = (blocks / scale.float()[..., None]).round() + zero.float()[..., None]
        codes = codes.clamp(0, most)
        meant = ((codes - zero.float()[..., None]).bfloat16() * scale[..., None]).reshape(outputs, inputs)
        stored = {
            f"{stem}weight_packed": words(codes.reshape(outputs, inputs).to(torch.uint8), self.bits),
            f"{stem}weight_scale": scale,
            f"{stem}weight_shape": torch.tensor([outputs, inputs]),
        }
        if not self.symmetric:
            stored[f"{stem}weight_zero_point"] = words(zero.to(torch.uint8).t().contiguous(), self.bits).t()
        return stored, meant


class Rows(Packer):
    """8 bits per weight, one scale per row; `static`: one scale for the inputs of a layer too."""

    def __init__(self, dtype: str, largest: int, static=False):
        super().__init__()
        self.dtype, self.largest, self.static = dtype, largest, static

    def layer(self, weight, stem):
        import torch

        scale = (weight.abs().amax(1, keepdim=True) / self.largest).bfloat16()
        codes = weight / scale.float()
        codes = (codes.round() if self.dtype == "int8" else codes).clamp(-self.largest, self.largest)
        codes = codes.to(getattr(torch, self.dtype))
        stored = {f"{stem}weight": codes, f"{stem}weight_scale": scale}
        if self.static:
            stored[f"{stem}input_scale"] = torch.tensor([0.05], dtype=torch.bfloat16)
        return stored, codes.bfloat16() * scale


class FourBitFloats(Packer):
    """E2M1, two per byte, the first in the low half. NVFP4: groups of 16, an e4m3 scale per group and one fp32 scale per
    tensor. MXFP4: groups of 32, powers of two as scales. `rounding`: a scale for the inputs of a layer too."""

    VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    def __init__(self, group=16, rounding=False):
        super().__init__()
        self.group, self.rounding = group, rounding

    def layer(self, weight, stem):
        import torch

        outputs, inputs = weight.shape
        blocks = weight.reshape(outputs, inputs // self.group, self.group)
        largest, stored = blocks.abs().amax(-1), {}
        if self.group == 16:
            overall = (448 * 6 / weight.abs().max()).reshape(1)
            scale = (largest / 6 * overall).to(torch.float8_e4m3fn)
            real = (scale.float() / overall)[..., None]
            stored[f"{stem}weight_global_scale"] = overall
        else:
            exponent = largest.log2().floor() - 2
            scale, real = (exponent + 127).to(torch.uint8), exponent.exp2()[..., None]
        if self.rounding:
            stored[f"{stem}input_global_scale"] = torch.tensor([448 * 6 / 20.0])
        values = torch.tensor(self.VALUES)
        index = ((blocks / real).abs()[..., None] - values).abs().argmin(-1)
        codes = (index + 8 * (blocks < 0)).to(torch.uint8).reshape(outputs, inputs)
        meant = (
            (values[index] * torch.where(blocks < 0, -1.0, 1.0) * real).reshape(outputs, inputs).bfloat16()
        )
        stored[f"{stem}weight_packed"] = codes[:, 0::2] | (codes[:, 1::2] << 4)
        return {**stored, f"{stem}weight_scale": scale}, meant


KINDS = {  # name → (how it is packed, quantization_config, the column's words)
    "w4": (Groups(), quantization("pack-quantized", arguments(4, "int", "group", 64)), "W4A16"),
    "asym": (Groups(symmetric=False), quantization("pack-quantized", arguments(4, "int", "group", 64, symmetric=False)),
             "W4A16"),
    "int8": (Rows("int8", 127), quantization("int-quantized", arguments(8, "int", "channel"),
                                             arguments(8, "int", "token", dynamic=True)), "W8A8"),
    "fp8": (Rows("float8_e4m3fn", 448), quantization("float-quantized", arguments(8, "float", "channel"),
                                                     arguments(8, "float", "token", dynamic=True)),
            "FP8 with FP8 activations"),
    "static": (Rows("float8_e4m3fn", 448, static=True),
               quantization("float-quantized", arguments(8, "float", "channel"), arguments(8, "float", "tensor")),
               "FP8 with FP8 activations"),
    "nvfp4": (FourBitFloats(), quantization("nvfp4-pack-quantized", arguments(4, "float", "tensor_group", 16)), "NVFP4"),
    "mxfp4": (FourBitFloats(32), quantization("mxfp4-pack-quantized", {**arguments(4, "float", "group", 32),
                                                                       "scale_dtype": "torch.uint8"}), "MXFP4"),
    "w4a4": (FourBitFloats(rounding=True),
             quantization("nvfp4-pack-quantized", arguments(4, "float", "tensor_group", 16),
                          arguments(4, "float", "tensor_group", 16, dynamic="local")), "NVFP4 with NVFP4 activations"),
}  # fmt: skip
