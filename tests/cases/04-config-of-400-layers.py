"""config.json promises 400 layers, the weights file holds 2.

Reported in public: a config that does not belong to the weights makes a loader allocate and initialize the whole
promised model before it says (or doesn't say) that nearly all of it is missing: minutes, and memory.
Command: comparator run -m FOLDER -v bf16 -p Hello   (hidden size 1024, so that 400 layers would be 9 GB)
Right: refused from the headers, before anything is allocated: under 15 s, saying that layers are missing.
"""

from common import edit_config, run, tiny, verdict

path = tiny(
    hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=4, vocab_size=49152
)
edit_config(path, num_hidden_layers=400, layer_types=None)
said = run(path)
told = not said.ok and said.names(r"400|layers\.\d+|layer", r"missing|lack|holds|not in|without")
verdict(told and said.seconds < 15, f"{said.line} ({said.seconds:.0f} s)")
