"""A saved comparison → the fidelity table of docs/fidelity.md, as Markdown.

python -m comparator run --fidelity text … --output table.json && python scripts/fidelity_table.py table.json
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from comparator.core import document
from comparator.fidelity import verdict
from comparator.metrics.definitions import stored_bytes

HEAD = (
    "variant", "MB", "mean KL, nats", "median", "99 %", "own noise floor", "perplexity", "ratio to the reference",
    "RMS Δp", "agrees", "top-5 overlap", "verdict",
)  # fmt: skip


def main(path: str) -> None:
    comparison = document.read(path)
    print("| " + " | ".join(HEAD) + " |")
    print("|---|" + "---:|" * (len(HEAD) - 2) + "---|")
    for one in verdict.verdicts(comparison):
        cell = one.cell

        def text(*keys: str, cell=cell) -> float:
            return verdict.figure(cell, *keys) or 0.0

        size = f"{stored_bytes(cell) / 1e6:.1f}"
        floor = f"{text('floor', 'kl', 'mean'):.2g}"
        ppl = f"{text('ppl'):.2f} ± {text('ppl_se'):.2f}"
        row = [f"`{cell.variant}`", size, "0", "0", "0", floor, ppl, "1", "0", "100 %", "100 %", one.words]
        if not one.is_reference:
            row[2:5] = [
                f"{text('kl', 'mean'):.2g} ± {text('kl', 'se'):.1g}",
                f"{text('kl', 'median'):.2g}",
                f"{text('kl', 'p99'):.2g}",
            ]
            row[7:11] = [
                f"{text('ppl_ratio'):.4f} ± {text('ppl_ratio_se'):.4f}",
                f"{100 * text('delta_p', 'rms'):.2f} pp",
                f"{100 * text('top1', 'mean'):.1f} ± {100 * text('top1', 'se'):.1f} %",
                f"{100 * text('top5_overlap'):.1f} %",
            ]
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main(sys.argv[1])
