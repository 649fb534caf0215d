"""Packed GPTQ tensors in a folder whose config does not say that they are quantized.

Reported in public: config.json replaced by the original model's; the loader takes none of the packed tensors and fills
every matrix at random.
Command: comparator run -m FOLDER -v bf16 -p Hello
Right: refused, naming the packed tensors (qweight, scales) or the missing weights, and the quantization_config that is
missing.
"""

import torch
from common import put_weights, refused, run, tiny, weights

path, packed = tiny(), {}
for name, tensor in weights(path).items():
    if ".mlp." in name or ".self_attn." in name:
        rows, columns = tensor.shape
        stem = name.removesuffix(".weight")
        packed |= {
            f"{stem}.qweight": torch.ones(columns // 8, rows, dtype=torch.int32),
            f"{stem}.qzeros": torch.ones(max(columns // 32, 1), rows // 8, dtype=torch.int32),
            f"{stem}.scales": torch.full((max(columns // 32, 1), rows), 0.01, dtype=torch.float16),
            f"{stem}.g_idx": torch.arange(columns, dtype=torch.int32) // 32,
        }
    else:
        packed[name] = tensor
put_weights(path, packed)
refused(run(path), r"qweight|packed|quantiz|missing|lack")
