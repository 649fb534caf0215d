"""A `quantization_config` for GPTQ over weights that are plain bf16.

Reported in public: a config copied from a quantized repository onto a merged or dequantized model.
Command: comparator run -m FOLDER -v bf16 -p Hello
Right: refused from the headers, saying that the config promises GPTQ and the file holds bf16 weights (no qweight).
"""

from common import edit_config, refused, run, tiny

path = tiny()
edit_config(
    path,
    quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
)
refused(run(path), r"gptq|quantiz", r"qweight|not (packed|quantized)|holds|bf16|bfloat16|16[- ]bit")
