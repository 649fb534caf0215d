"""What a decode step reads and writes, at addresses that never change: token, position, keys and values.

A captured graph replays the same memory addresses, so the cache is allocated whole, and token and position are
tensors that the step itself advances. Knows nothing of graphs.
"""

from __future__ import annotations

from typing import Any

from comparator.generate import input_device

BUCKET = 256


def bucket(tokens: int) -> int:
    """Cache length for this many tokens: in steps of 256 up to 1,024, then of 1,024, so that few graphs serve all."""
    step = BUCKET if tokens <= 1024 else 1024
    return -(-tokens // step) * step


class Fixed:
    """State of `batch` sequences of one length, of at most `capacity` tokens each.

    `token`: (batch, 1) int64, what the next step is fed; `position`: (1, 1) int64, where. `chosen`: (batch,) int64,
    what the last step chose, or −1 where its logits held no finite maximum. `logits`: (batch, vocabulary) float32 of
    the last step.
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
        self._additive = model.config._attn_implementation == "eager"

    def fill(self, prompt_cache: Any, length: int, token: Any, vocabulary: int) -> None:
        """Take over the keys and values of a prefilled prompt, and the token that comes after it: an int, or a tensor
        (batch,)."""
        import torch

        if self.cache is None:
            self.cache = _cache(prompt_cache, self.capacity, self.position)
        for layer, source in zip(self.cache.layers, prompt_cache.layers, strict=True):
            layer.keys[:, :, :length].copy_(source.keys)
            layer.values[:, :, :length].copy_(source.values)
            # Masked slots are multiplied by 0, and 0 × NaN is NaN: an earlier run that overflowed must not stay.
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
        """The best of `scores` (batch, vocabulary) becomes the next token; the host learns of it through `chosen`."""
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
        """transformers' static layer, told its position by the one tensor that all layers share: two kernels a
        layer instead of five."""

        def __init__(self, source: Any):
            super().__init__(max_cache_len=capacity)
            for name in ("keys", "values"):
                given = getattr(source, name)
                batch, heads, _, size = given.shape
                setattr(self, name, given.new_zeros((batch, heads, capacity, size)))
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
    """The largest of `scores` (batch, vocabulary) and where it is first, (batch,) each; NaN where there is one.

    In two stages: to PyTorch one row is one block's work, and 128,256 logits take it 28 µs, a hundredth of a fast step.
    """
    batch, size = scores.shape
    part = next((p for p in (512, 256, 128) if size % p == 0), size)
    tops, places = scores.reshape(batch, -1, part).max(dim=-1)
    top, which = tops.max(dim=-1)
    return top, which * part + places.gather(-1, which.view(-1, 1)).view(-1)


def refusal(model: Any, capacity: int) -> str | None:
    """Why this model cannot decode on fixed addresses, or None. Looks only; runs nothing."""
    import inspect

    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    places = {str(p.device) for p in model.parameters()}
    if len(places) > 1:
        return f"the model is spread over {', '.join(sorted(places))}"
    if any(not _follows(name) for name in {type(m).__name__ for m in model.modules()}):
        return "ExLlamaV2 launches its kernels on CUDA's default stream, which a graph does not see"
    taken = inspect.signature(model.forward).parameters
    if hasattr(model, "get_base_model"):  # peft's wrapper passes everything on
        taken = inspect.signature(model.get_base_model().forward).parameters
    if not model._supports_default_dynamic_cache() or "past_key_values" not in taken:
        return "this architecture keeps its state in a cache of its own kind"
    if "position_ids" not in taken:
        return "this architecture computes positions from the length so far, which a fixed graph does not see"
    config = model.config.get_text_config(decoder=True)
    if model.config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention ({model.config._attn_implementation}) builds its own mask"
    for layer in DynamicCache(config=config).layers:
        window = getattr(layer, "sliding_window", None)
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"it has layers whose state is a {type(layer).__name__}"
        if type(layer) is DynamicSlidingWindowLayer and capacity > (window or 0):
            return f"prompt and answer ({capacity:,} slots) exceed its sliding window of {window:,} tokens"
    return None


def _follows(kernel_class: str) -> bool:
    from comparator.gptq import streams

    return streams.follows(kernel_class)
