"""The kernels of `triton_fused.py` in plain torch: their specification, and the implementation on a CPU.

Shapes: B sequences, H query heads, K key heads, D values per head, C slots of the cache; one token per sequence.
"""

from __future__ import annotations

from typing import Any


def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """x (…, D) → (…, D): weight · x / √(mean x² + ε), in float32 and rounded before the last product, as in
    transformers' LlamaRMSNorm."""
    import torch

    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def rotate(q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    """q (B, H, 1, D), k (B, K, 1, D), cos and sin (B or 1, 1, D) → both rotated, computed in their dtype."""
    import torch

    def turned(x: Any) -> Any:
        low, high = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(1)

    return turned(q), turned(k)


def attend(query: Any, keys: Any, values: Any, position: Any, scaling: float) -> Any:
    """query (B, H, 1, D), keys and values (B, K, C, D), position (1, 1): the last filled slot → (B, 1, H, D).

    softmax(scaling · q kᵀ) v over the slots up to `position`, in float32; the softmax is rounded to the values' dtype.
    """
    import torch

    batch, heads, _, size = query.shape
    grouped = query.reshape(batch, keys.shape[1], -1, size).float()
    scores = grouped @ keys.float().transpose(-1, -2) * scaling
    later = torch.arange(keys.shape[2], device=keys.device) > position.view(1)
    shares = scores.masked_fill(later, float("-inf")).softmax(-1).to(values.dtype)
    return (shares.float() @ values.float()).to(query.dtype).reshape(batch, 1, heads, size)
