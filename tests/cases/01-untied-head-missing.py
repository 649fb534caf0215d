"""An untied output head that the weights file does not hold.

Reported in public: a fine-tuned model whose config says tie_word_embeddings=false was saved without lm_head.weight;
the loader fills the head with random numbers, warns in a log at most, and the answers are noise.
Command: comparator run -m FOLDER -v bf16 -v nf4 -p Hello
Right: every column refused, naming lm_head.weight as missing. Never a column over random weights.
"""

from common import put_weights, refused, run, tiny, weights

path = tiny()
put_weights(path, {k: v for k, v in weights(path).items() if k != "lm_head.weight"})
refused(
    run(path, "bf16", "nf4"),
    r"lm_head\.weight",
    r"missing|not in|lack|absent|without|no weight|random|does not hold",
)
