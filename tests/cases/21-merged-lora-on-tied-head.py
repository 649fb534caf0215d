"""A merged LoRA on a tied output layer also changes the embedding.

Fault: where the output layer and the input embedding are one tensor, an adapter that targets lm_head is added to that
one tensor when it is merged. The input embedding then changes as well, which the unmerged adapter never does.
Command: run -m TIED -v fp32 -a LORA -a LORA:merged -p Hello -n 8
Right: the merged column does what the unmerged one does (its drift is about 0 and the first tokens' divergence from it
too), or the merged one is refused with a reason.
"""

import torch
from adapter_cases import cli, end, folder, lora, tiny

top = folder()
model = tiny(top / "model", tied=True)
torch.manual_seed(1)
a, b = torch.randn(4, 64) * 0.3, torch.randn(49152, 4) * 0.3
adapter = lora(top / "lora", {"lm_head": (a, b)}, ["lm_head"])
ran = cli(
    "-m", model, "-v", "fp32", "-a", adapter, "-a", f"{adapter}:merged", "-p", "Hello", "-n", "8", "--raw"
)
cells = ran.cells()
if len(cells) < 3 or cells[2]["status"] == "failed":
    end(
        len(cells) == 3 and not ran.crashed() and "merge" in str(cells[2]["error"]),
        f"merged refused: {ran.brief()}",
    )
worn, merged = cells[1], cells[2]
p, q = worn["fidelity"]["prompt"]["p"][0], merged["fidelity"]["prompt"]["p"][0]
same = worn["token_ids"] == merged["token_ids"] and abs(p - q) < 1e-3
end(
    same,
    f"unmerged gives {worn['token_ids']} (p of the first {p:.4f}), merged {merged['token_ids']} ({q:.4f})",
)
