"""A safetensors header whose shapes are numbers of thousands of digits.

Command: comparator run -m FOLDER -v bf16 -p Hello
Right: refused within 20 s (most of it start-up), saying that the header is not valid.
"""

import struct

from common import run, tiny, verdict

path = tiny()
shape = ",".join(["9" * 4200] * 1000)
header = ('{"model.norm.weight":{"dtype":"BF16","shape":[' + shape + '],"data_offsets":[0,128]}}').encode()
(path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(128))
said = run(path)
verdict(not said.ok and said.code != 124 and said.seconds < 20, f"{said.line} ({said.seconds:.0f} s)")
