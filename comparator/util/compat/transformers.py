"""Private parts of transformers; written for transformers 5.23."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

WRITTEN_FOR = "5.23"


def takes_dynamic_cache(model: Any) -> bool:
    """Whether the model keeps its state in a DynamicCache."""
    return bool(model._supports_default_dynamic_cache())


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model can be asked for the logits of its last tokens only."""
    return model._supports_logits_to_keep()


def attention(model: Any) -> str:
    """The attention implementation in use: "sdpa", "eager", …"""
    return model.config._attn_implementation


def logits_processors(model: Any, config: Any, prompt_length: int, device: Any) -> Any:
    """The LogitsProcessorList that `generate` makes from a GenerationConfig; `config` is changed in place."""
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=device)
    return model._get_logits_processor(
        generation_config=config, input_ids_seq_length=prompt_length, device=device, model_kwargs={}
    )


def decode_kernels(model: Any) -> Any:
    """A context manager: inside, mixture-of-experts layers use the kernels that `generate` decodes with."""
    switch = getattr(model, "_optimize_model_for_decode", None)
    return switch() if switch else contextlib.nullcontext()


@contextlib.contextmanager
def attention_function(table: Any, name: str, function: Callable) -> Iterator[None]:
    """Inside, an AttentionInterface has `function` under `name`, for itself alone; its own override is restored."""
    before = table._local_mapping.get(name)
    table[name] = function
    try:
        yield
    finally:
        if before is None:
            del table[name]
        else:
            table[name] = before


def use_one_gpu(arguments: Any) -> None:
    """Have a Trainer with these TrainingArguments use one GPU at most; its own is all of the machine."""
    arguments._n_gpu = min(arguments.n_gpu, 1)


def kept_in_fp32(model: Any) -> list[str]:
    """Names of modules that the model's class wants in fp32 whatever the dtype: what a quantizer leaves alone too."""
    return list(model._keep_in_fp32_modules or ())


def causal_class(config: Any) -> type:
    """The causal language model's class for a config. `from_config` would make the model too, and change torch's default dtype for
    every thread."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM._model_mapping[type(config)]


def use_batched_experts(config: Any) -> None:
    """Have a model multiply its experts by the implementation whose shapes do not depend on the routing."""
    config._experts_implementation = "batched_mm"


def mark_loaded(module: Any) -> None:
    """Have `from_pretrained` leave a module as it is that it did not fill itself."""
    module._is_hf_initialized = True


@contextlib.contextmanager
def read_into_memory() -> Iterator[bool]:
    """Inside, `from_pretrained` reads tensors of safetensors files into memory of their own instead of mapping the files, whose
    pages count as memory of the process for as long as it loads. Yields whether these versions can (safetensors from 0.8).
    """
    import safetensors
    from transformers import modeling_utils

    mapping = modeling_utils.safe_open
    able = tuple(map(int, safetensors.__version__.split(".")[:2])) >= (0, 8)
    if able:
        modeling_utils.safe_open = lambda *args, **options: mapping(*args, **{**options, "backend": "pread"})
    try:
        yield able
    finally:
        modeling_utils.safe_open = mapping


def quantized_cache(config: Any, bits: int, group: int) -> Any:
    """transformers' QuantizedCache with HQQ, in groups of `group` values of one head and token. HQQ packs two rows of 4 bits into one, so a
    token is added where their number is odd, and taken away again; transformers' own layer fails there."""
    import torch
    from transformers import QuantizedCache
    from transformers.cache_utils import HQQQuantizedLayer

    class Layer(HQQQuantizedLayer):
        def _quantize(self, tensor: Any, axis: int) -> tuple[Any, Any]:
            odd = tensor.shape[-2] % 2
            even = torch.cat([tensor, tensor[..., -1:, :]], dim=-2) if odd else tensor
            return super()._quantize(even, axis), tensor.shape[-2]

        def _dequantize(self, qtensor: tuple[Any, Any]) -> Any:
            stored, length = qtensor
            return super()._dequantize(stored)[..., :length, :]

    how = {"nbits": bits, "axis_key": 1, "axis_value": 1, "q_group_size": group}
    cache = QuantizedCache("hqq", config, **how)
    cache.layers = [Layer(**how) for _ in cache.layers]
    return cache


def gguf_text_splits() -> set[str]:
    """The names of tokenizers' ways to split text (`tokenizer.ggml.pre`) that transformers converts from GGUF."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return set(GGUF_PRE_TOKENIZER_SPLITS)
