"""A mixture of experts whose fused experts a 4-bit method leaves as they are.

Reported in public: "4-bit" of such a model takes nearly as much memory as 16 bits, because experts are parameters of a
fused module and not linear layers.
Command: comparator run -m FOLDER -v bf16 -v nf4 -p Hello   (tiny Mixtral)
Right: experts are quantized, or the column's notes state which share of the weights stays in 16 bits, and why.
"""

import re

from common import run, tiny, verdict

path = tiny("mixtral", num_local_experts=4, num_experts_per_tok=2, intermediate_size=256, vocab_size=49152)
said = run(path, "bf16", "nf4")
cell = said.cell(1) or {}
said_so = re.search(r"expert", " ".join(map(str, cell.get("notes") or [])), re.I) and re.search(
    r"\d+(\.\d+)? ?%", " ".join(map(str, cell["notes"]))
)
packed = any("expert" in row["name"] and row["storage_dtype"] == "uint8" for row in cell.get("layers") or [])
verdict(
    cell.get("status") == "ok" and bool(packed or said_so),
    f"notes: {cell.get('notes')}" if cell else said.line,
)
