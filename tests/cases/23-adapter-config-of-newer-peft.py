"""adapter_config.json with settings that the installed peft does not know.

Fault: a newer peft writes keys that this one has no field for. Building the config with them may end in a TypeError,
or the keys are dropped in silence though they may change what the adapter does.
Command: run -m MODEL -v fp32 -a LORA -p Hello -n 8
Right: no traceback; the unknown setting is named, in the refusal or in a note of the column.
"""

import torch
from adapter_cases import cli, end, folder, lora, tiny

top = folder()
model = tiny(top / "model")
tensors = {f"model.layers.{i}.self_attn.q_proj": (torch.randn(4, 64), torch.randn(64, 4)) for i in range(2)}
adapter = lora(
    top / "lora", tensors, ["q_proj"], use_hyperspline=True, spline_knots=[1, 2, 3], peft_version="9.9.9"
)
ran = cli("-m", model, "-v", "fp32", "-a", adapter, "-p", "Hello", "-n", "8", "--raw")
cells = [c for c in ran.cells() if c["adapter"]]
told = ran.text + str([(c["error"], c["notes"]) for c in cells])
named = "use_hyperspline" in told
status = cells[0]["status"] if cells else "no column"
end(
    named and not ran.crashed(),
    f"column {status}, unknown key named: {named}; {cells[0]['notes'] if cells else ran.brief()}",
)
