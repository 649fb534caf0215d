"""An adapter's target_modules is a regular expression that takes exponential time.

Fault: target_modules may be a string, which is matched as a pattern against every module's name. A nested repetition
never comes back, and an adapter is something that people download.
Command: run -m MODEL -v fp32 -a LORA -p Hello -n 4
Right: the command ends by itself (within 300 s on a machine however busy), the adapter refused with a reason.
"""

import torch
from adapter_cases import CATASTROPHE, cli, end, folder, lora, tiny

top = folder()
model = tiny(top / "model")
tensors = {f"model.layers.{i}.self_attn.q_proj": (torch.randn(4, 64), torch.randn(64, 4)) for i in range(2)}
ran = cli(
    "-m",
    model,
    "-v",
    "fp32",
    "-a",
    lora(top / "lora", tensors, CATASTROPHE),
    "-p",
    "Hello",
    "-n",
    "4",
    "--raw",
    seconds=300,
)
cells = [c for c in ran.cells() if c["adapter"]]
good = ran.rc in (1, 2) and not ran.crashed()
end(
    good,
    f"{'had to be killed' if ran.rc is None else 'ended'}: {cells[0]['error'] if cells else ran.brief()[-250:]}",
)
