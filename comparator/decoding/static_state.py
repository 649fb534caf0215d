"""Tensors that a captured decode step reads and writes at fixed addresses: token, position, keys and values.

A captured graph replays the same memory addresses, so the cache is allocated in full, and token and position are tensors
that the step itself advances.
"""

from __future__ import annotations

from typing import Any

from comparator.backends import owner
from comparator.decoding.introspect import input_device
from comparator.decoding.kv_cache import is_quantized
from comparator.util.compat import transformers as compat

BUCKET = 256


def bucket(tokens: int) -> int:
    """Cache length for this many tokens: a multiple of 256 up to 1,024, then of 1,024, so that few graphs are needed."""
    step = BUCKET if tokens <= 1024 else 1024
    return -(-tokens // step) * step


class StaticDecodeState:
    """State of `batch` sequences of one length, of at most `capacity` tokens each.

    `token`: (batch, 1) int64, the next step's input; `position`: (1, 1) int64, its position. `chosen`: (batch,) int64,
    the tokens of the last step, −1 where its logits had no finite maximum. `logits`: (batch, vocabulary) float32 of the
    last step.
    """

    def __init__(self, model: Any, capacity: int, batch: int = 1):
        import torch

        self.model, self.capacity, self.batch = model, capacity, batch
        self.device = input_device(model)
        self.token = torch.zeros((batch, 1), dtype=torch.long, device=self.device)
        self.position = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        self.chosen = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.slots = torch.arange(capacity, device=self.device)
        self.logits: Any = None
        self.cache: Any = None
        self._additive = compat.attention(model) == "eager"

    def fill(self, prompt_cache: Any, length: int, token: Any, vocabulary: int) -> None:
        """Copy the keys and values of a prefilled prompt of `length` tokens, and set the token after it: an int, or a
        tensor (batch,)."""
        import torch

        if self.cache is None:
            self.cache = _cache(prompt_cache, self.capacity, self.position)
        for layer, source in zip(self.cache.layers, prompt_cache.layers, strict=True):
            layer.keys[:, :, :length].copy_(source.keys)
            layer.values[:, :, :length].copy_(source.values)
            # Masked slots are multiplied by 0, and 0 × NaN is NaN: clear what an earlier run that overflowed has left.
            layer.values[:, :, length:].zero_()
            layer.keys[:, :, length:].zero_()
        if isinstance(token, int):
            self.token.fill_(token)
        else:
            self.token.copy_(token.view(-1, 1))
        self.position.fill_(length)
        if self.logits is None:
            self.logits = torch.zeros((self.batch, vocabulary), dtype=torch.float32, device=self.device)

    def forward(self) -> Any:
        """Logits (batch, vocabulary) of the step, in the model's dtype."""
        import torch

        mask = (self.slots <= self.position).view(1, 1, 1, -1)
        if self._additive:
            dtype = self.cache.layers[0].keys.dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        outputs = self.model(
            input_ids=self.token,
            attention_mask=mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        return outputs.logits[:, -1]

    def choose(self, scores: Any) -> None:
        """Set the next token to the argmax of `scores` (batch, vocabulary); `chosen` is for the host."""
        import torch

        top, token = best(scores)
        self.token.copy_(token.view(-1, 1))
        self.chosen.copy_(torch.where(torch.isfinite(top), token, -1))

    @property
    def bytes(self) -> int:
        from comparator.metrics.memory import unique_bytes

        if self.cache is None:
            return 0
        return unique_bytes([t for layer in self.cache.layers for t in (layer.keys, layer.values)])


def _cache(prompt_cache: Any, capacity: int, position: Any) -> Any:
    """An empty cache of `capacity` tokens, shaped like that of a prefilled prompt."""
    import torch
    from transformers import Cache
    from transformers.cache_utils import StaticLayer

    class FixedLayer(StaticLayer):
        """transformers' static layer with the position tensor that all layers share: two kernels per layer instead of
        five."""

        def __init__(self, source: Any):
            super().__init__(max_cache_len=capacity)
            for name in ("keys", "values"):
                tensor = getattr(source, name)
                batch, heads, _, size = tensor.shape
                setattr(self, name, tensor.new_zeros((batch, heads, capacity, size)))
            self.dtype, self.device = self.keys.dtype, self.keys.device
            self.is_initialized = True
            self.place = position.view(1)

        def update(self, key_states, value_states, *_, **__):
            self.keys.index_copy_(2, self.place, key_states)
            self.values.index_copy_(2, self.place, value_states)
            return self.keys, self.values

        def get_seq_length(self, *_):
            return self.place

    with torch.inference_mode(False):
        return Cache(layers=[FixedLayer(layer) for layer in prompt_cache.layers])


def best(scores: Any) -> tuple[Any, Any]:
    """(maximum, index of the first maximum) of `scores` (batch, vocabulary), each (batch,); NaN where there is one.

    In two stages: PyTorch reduces a row with one block, which takes 28 µs for 128,256 logits, 1 % of a fast step.
    """
    batch, size = scores.shape
    part = next((p for p in (512, 256, 128) if size % p == 0), size)
    tops, places = scores.reshape(batch, -1, part).max(dim=-1)
    top, which = tops.max(dim=-1)
    return top, which * part + places.gather(-1, which.view(-1, 1)).view(-1)


def refusal(model: Any, capacity: int) -> str | None:
    """Why this model cannot decode with `StaticDecodeState`, or None. Runs nothing."""
    import inspect

    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if is_quantized(model):
        return "its KV cache is quantized"
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(devices))}"
    for module in model.modules():
        backend = owner(module)
        if backend is not None and (reason := backend.graph_refusal(module)) is not None:
            return reason
    parameters = inspect.signature(model.forward).parameters
    if hasattr(model, "get_base_model"):  # peft's wrapper passes everything on
        parameters = inspect.signature(model.get_base_model().forward).parameters
    if not compat.takes_dynamic_cache(model) or "past_key_values" not in parameters:
        return "this architecture has its own kind of cache"
    if "position_ids" not in parameters:
        return (
            "this architecture computes positions from the current length, which a CUDA graph cannot follow"
        )
    config = model.config.get_text_config(decoder=True)
    if compat.attention(model) not in ("sdpa", "eager"):
        return f"its attention ({compat.attention(model)}) builds its own mask"
    for layer in DynamicCache(config=config).layers:
        window = getattr(layer, "sliding_window", None)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"it has layers whose state is a {type(layer).__name__}"
        if type(layer) is DynamicSlidingWindowLayer and capacity > (window or 0):
            return f"prompt and answer ({capacity:,} slots) exceed its sliding window of {window:,} tokens"
    return None
