"""Parts of a split GGUF, and GGUF files that are no language model.

Command: comparator run -m FILE -v bf16 -p Hello, with a second part, and with a projector (general.architecture clip)
Right: each is named for what it is within 15 s ("part 2 of 2, give the first"; "a vision projector, not a model").
"""

import numpy as np
from common import folder, run, verdict
from gguf import GGUFWriter

part, projector = folder() / "tiny-00002-of-00002.gguf", folder() / "mmproj-tiny.gguf"
for path, arch in ((part, "llama"), (projector, "clip")):
    writer = GGUFWriter(str(path), arch)
    if path is part:
        (
            writer.add_uint16("split.no", 1),
            writer.add_uint16("split.count", 2),
            writer.add_int32("split.tensors.count", 3),
        )
    writer.add_tensor("blk.1.attn_q.weight", np.ones((64, 64), dtype=np.float32))
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )
a, b = run(part), run(projector)
right = (not a.ok and a.seconds < 15 and a.names(r"\bpart\b|split|00001|first")) and (
    not b.ok and b.seconds < 15 and b.names(r"projector|clip|mmproj|vision")
)
verdict(right, f"{a.line} ({a.seconds:.0f} s) / {b.line} ({b.seconds:.0f} s)")
