"""Loading a checkpoint whose packed layers stay packed: layers of a backend's own stand in for linear layers before
transformers fills the model, so that it loads the stored tensors into them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from comparator.core.errors import UserError

NAME = "quant_comparator_stored"


class PassedOn(QuantizationConfigMixin):
    """A config that transformers hands to its quantizer as it is: never written to a file, nor read from one."""

    @classmethod
    def from_dict(cls, config_dict: Any, **_: Any) -> Any:
        """transformers passes on what it was given."""
        return config_dict["settings"]

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "settings": self}


@register_quantization_config(NAME)
class StoredLayers(PassedOn):
    """layers: by module's name, what makes the layer in place of a `torch.nn.Linear` on the meta device. A layer's `finish()` is
    called once its tensors are loaded. title: the method as it is spoken of."""

    def __init__(self, title: str, layers: dict[str, Callable[[torch.nn.Linear], torch.nn.Module]]):
        self.quant_method = NAME
        self.title, self.layers = title, layers


@register_quantizer(NAME)
class StoredLayersQuantizer(HfQuantizer):
    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        settings = self.quantization_config
        for name, make in settings.layers.items():
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                linear = None
            if type(linear) is not torch.nn.Linear:
                raise UserError(
                    f"The checkpoint stores {name} in {settings.title}, and the model has no linear layer of this name.",
                    "Use a checkpoint in which linear layers alone are quantized.",
                )
            model.set_submodule(name, make(linear))
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name in self.quantization_config.layers:
            model.get_submodule(name).finish()
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True
