"""A model that was saved after bitsandbytes quantized it, the `-bnb-4bit` kind that people download.

Command: comparator run -m CLEAN -v nf4 -v nf4@SAVED -p Hello
Right: the saved one is a column of its own; its tokens are those of nf4 made on the spot, and its layers are packed.
"""

import torch
from common import cut, folder, run, tokenizer_into, verdict
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

path, saved = cut(), folder("saved")
how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.bfloat16, quantization_config=how, device_map="cpu"
).save_pretrained(saved)
tokenizer_into(saved)
said = run(path, "nf4", f"nf4@{saved}")
ok = (
    len(said.columns) == 2
    and said.columns[1]["status"] == "ok"
    and said.columns[0]["token_ids"] == said.columns[1]["token_ids"]
)
verdict(ok, said.line)
