"""`skip=` that names one module must not drop the method's own list of modules to leave alone.

Reported in public: naming a module to skip replaces the library's default list, so that the output head is quantized
too, in silence.
Command: comparator layers -m FOLDER -v nf4:skip=q_proj   (an untied head)
Right: lm_head is stored in 16 bits, as it is in plain nf4; q_proj is, too; k_proj is packed.
"""

from common import layers, tiny, verdict

path = tiny()
rows = {row["name"]: row["storage_dtype"] for row in layers(path, "nf4:skip=q_proj").rows}
stored = {
    part: next((kind for name, kind in rows.items() if part in name), "absent")
    for part in ("lm_head", "q_proj", "k_proj")
}
verdict(
    "16" in stored["lm_head"] and "16" in stored["q_proj"] and stored["k_proj"] == "uint8",
    f"stored as {stored}",
)
