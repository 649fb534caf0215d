"""A model whose output head is all zeros: every token is as likely as any other.

Command: comparator run -m FOLDER -v fp32 -v nf4 -p Hello, with fidelity
Right: neither a win nor "nearly the same" without a word: the column says that the distributions are uniform (the model
is likely broken), in its notes or its verdict.
"""

import re

import torch
from common import notes, put_weights, run, tiny, verdict, weights

path = tiny()
made = weights(path)
made["lm_head.weight"] = torch.zeros_like(made["lm_head.weight"])
put_weights(path, made)
said = run(path, "fp32", "nf4", fidelity="prompt")
verdict(
    bool(re.search(r"uniform|equal(ly)? likely|all logits|broken|constant", notes(said), re.I)), said.line
)
