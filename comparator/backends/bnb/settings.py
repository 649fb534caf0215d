"""The options of bitsandbytes' variants."""

from __future__ import annotations

from comparator.backends.base import DTYPES, Option

_DTYPE = Option(
    "dtype", "dtype of what stays unquantized (embeddings, norms, lm_head) and of the activations", "bf16",
    choices=DTYPES,
)  # fmt: skip
_SKIP = Option(
    "skip",
    "modules to leave unquantized in addition to the output head, by name or its end, joined with +. skip=only+q_proj "
    "leaves "
    "these alone and quantizes the head too, unless it shares its weights with the embedding",
    None,
    kind="names",
)
INT8 = (
    Option(
        "threshold",
        "outlier threshold: input features with an entry above it are multiplied in 16 bits; 0 disables it",
        "6",
        kind="number",
        minimum=0,
    ),
    _SKIP,
    _DTYPE,
)

FOUR_BIT = (
    Option("dq", "double quantization: the absmax values are quantized to 8 bits too", "false", kind="flag",
           form="{name}"),
    Option("compute", "dtype in which a layer multiplies, after unpacking", "bf16", choices=DTYPES,
           transformers_default="fp32"),
    Option("storage", "dtype of the buffer that holds the packed 4-bit values; the bits are the same", "uint8",
           choices=("uint8", *DTYPES)),
    _SKIP,
    _DTYPE,
)  # fmt: skip
