"""A config that promises a vocabulary of 20 million over a small file.

Command: comparator run -m FOLDER -v bf16 -p Hello
Right: refused from the headers within 20 s, naming vocab_size or the embedding's shape; the process stays below 2 GB.
"""

import resource

from common import edit_config, run, tiny, verdict

path = tiny(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
edit_config(path, vocab_size=20_000_000)
said = run(path)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
verdict(
    not said.ok and said.code != 124 and said.seconds < 20 and peak < 2e9 and said.names(r"vocab|embed"),
    f"{said.line} ({said.seconds:.0f} s, {peak / 1e9:.1f} GB)",
)
