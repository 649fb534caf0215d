"""adapter_config.json says r = 8000, the tensors have rank 4.

Fault: the ranks in the file's header are not compared with the config's before the layers are made, so gigabytes are
allocated for an adapter that cannot be loaded in the end.
Command: run -v bf16 -a LORA -p Hello -n 4   (built-in model: 30 layers)
Right: refused in under 20 s with less than 2 GB of resident memory at the highest, both ranks named.
"""

import torch
from adapter_cases import cli, end, folder, lora

top = folder()
sizes = {"self_attn.q_proj": (576, 576), "mlp.gate_proj": (576, 1536)}
tensors = {
    f"model.layers.{i}.{name}": (torch.randn(4, a), torch.randn(b, 4))
    for i in range(30)
    for name, (a, b) in sizes.items()
}
adapter = lora(top / "lora", tensors, ["q_proj", "gate_proj"], r=8000)
ran = cli("-v", "bf16", "-a", adapter, "-p", "Hello", "-n", "4")
cells = [c for c in ran.cells() if c["adapter"]]
refused = ran.rc in (1, 2) and not ran.crashed() and (not cells or cells[0]["status"] == "failed")
good = refused and ran.peak < 2e9 and ran.seconds < 20
end(
    good,
    f"refused: {refused}, {ran.seconds:.0f} s, peak {ran.peak / 1e9:.1f} GB; {cells[0]['error'] if cells else ran.brief()}",
)
