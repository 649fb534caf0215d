"""An adapter whose keys name no module of this model.

Fault: the tensors sit under `base_model.model.model.language_model.layers…`, as a multimodal model calls them; a text
model has `model.layers…`. The ends of the names and the shapes agree, so the check before loading passes, and what is
loaded may be nothing at all.
Command: run -m TEXT-MODEL -v fp32 -v nf4 -a LORA -p Hello -n 8
Right: the adapter is refused, or put on under the right names, or the column says it has no effect. An effect of
exactly 0 without a word is wrong.
"""

import torch
from adapter_cases import cli, end, folder, lora, tiny

top = folder()
model = tiny(top / "model")
torch.manual_seed(1)
prefix = "base_model.model.model.language_model.layers.{}.self_attn.q_proj"
tensors = {prefix.format(i): (torch.randn(4, 64), torch.randn(64, 4)) for i in range(2)}
ran = cli(
    "-m",
    model,
    "-v",
    "fp32",
    "-v",
    "nf4",
    "-a",
    lora(top / "lora", tensors, ["q_proj"]),
    "-p",
    "Hello",
    "-n",
    "8",
    "--raw",
)
cells = [c for c in ran.cells() if c["adapter"]]
if ran.crashed():
    end(False, ran.brief())
if not cells or all(c["status"] == "failed" for c in cells):
    end(ran.rc in (1, 2), f"refused: {cells[0]['error'] if cells else ran.brief()}")
base = next(c for c in ran.cells() if not c["adapter"])
silent = cells[0]["token_ids"] == base["token_ids"] and "effect" not in str(cells[0]["notes"])
end(not silent, f"column is ok, same tokens as the base: {silent}, notes {cells[0]['notes']}")
