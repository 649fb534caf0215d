"""8-bit float weights with their scales, and a config that names no quantization.

Reported in public: a block-quantized FP8 checkpoint whose quantization_config was removed; values are read without
their scales, and the model answers nonsense.
Command: comparator run -m FOLDER -v bf16 -p Hello
Right: refused, naming the scales (weight_scale_inv) or the float8 storage without a config.
"""

import torch
from common import put_weights, refused, run, tiny, weights

path, made = tiny(), {}
for name, tensor in weights(path).items():
    if "_proj." in name:
        made[name] = (tensor.float() * 100).to(torch.float8_e4m3fn)
        made[name.replace(".weight", ".weight_scale_inv")] = torch.full((1, 1), 0.01)
    else:
        made[name] = tensor
put_weights(path, made)
refused(run(path), r"scale|float8|fp8|f8")
