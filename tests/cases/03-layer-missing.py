"""One layer's tensors are not in the file.

Reported in public: a shard lost or a merge script's mistake leaves out a layer; the loader makes its weights up at
random, and the model talks nonsense without an error.
Command: comparator run -m FOLDER -v bf16 -v nf4 -p Hello
Right: refused, naming the missing layer's weights (model.layers.1…) and how many there are.
"""

from common import put_weights, refused, run, tiny, weights

path = tiny()
put_weights(path, {k: v for k, v in weights(path).items() if not k.startswith("model.layers.1.")})
refused(run(path, "bf16", "nf4"), r"layers\.1\b", r"\b\d+\b")
