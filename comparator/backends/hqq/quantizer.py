"""Loading with transformers: linear layers become HQQ layers while the weights are read, one after another.

transformers' own HQQ integration has ended: 5.23 refuses to quantize, and loads an HQQ checkpoint with random weights.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from comparator.backends.hqq.layer import HQQLinear
from comparator.backends.hqq.layout import Layout
from comparator.backends.stored_layers.quantizer import PassedOn
from comparator.util.compat import transformers as compat

NAME = "quant_comparator_hqq"


@register_quantization_config(NAME)
class HqqLayers(PassedOn):
    """layout: of every linear layer but the output head, which are quantized as they load."""

    def __init__(self, dtype: torch.dtype, layout: Layout):
        self.quant_method = NAME
        self.dtype, self.layout = dtype, layout


@register_quantizer(NAME)
class HqqQuantizer(HfQuantizer):
    requires_calibration = False
    left: tuple[str, ...] = ()  # modules that stay as they are, as transformers names them

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        name, _, parameter = param_name.rpartition(".")
        layout = self.quantization_config.layout
        if parameter != "weight" or not should_convert_module(name, list(self.left)):
            return False
        module = model.get_submodule(name)
        return type(module) is torch.nn.Linear and layout.divides(module.out_features, module.in_features)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        self.left = tuple(self.get_modules_to_not_convert(model, None, compat.kept_in_fp32(model)))
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """One weight → an HQQ layer in place of its linear layer."""

    def __init__(self, hf_quantizer: HqqQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict,
        full_layer_name: str = "",
        model: Any = None,
        missing_keys: Any = None,
        **_: Any,
    ) -> dict:
        settings = self.hf_quantizer.quantization_config
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        name = full_layer_name.rpartition(".")[0]
        linear = model.get_submodule(name)
        layer = HQQLinear.quantized(weight.to(settings.dtype), settings.layout, settings.dtype, linear.bias)
        compat.mark_loaded(layer)
        model.set_submodule(name, layer)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}
