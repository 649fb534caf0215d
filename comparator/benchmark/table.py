"""A bench's report as a Markdown table, with what was measured where below it. Pure text."""

from __future__ import annotations

from collections.abc import Iterator

from comparator.benchmark.types import Report

SHOWN = 14  # kernels a profile lists


def table(report: Report) -> str:
    """The report as a Markdown table, a line per path, with what was measured where below it."""
    head, lines = rows(report)
    text = (
        _lines([head, tuple("---" for _ in head), *lines])
        + "\n"
        + "".join(f"- {line}\n" for line in remarks(report))
    )
    return text + "".join(f"\n{part}" for part in profiles(report))


def rows(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(headings, a row per path); a variant's name stands in its first row alone."""
    head = ("variant", "path", "load s", "prepare s", "TTFT ms", "tok/s", "× stock", "MBU %", "resident MB",
            "load peak MB", "run peak MB", "J/token")  # fmt: skip
    lines = []
    for row in report.rows:
        if row.stock is None:
            lines.append((row.variant, "–", *[""] * (len(head) - 2)))
        for timed in filter(None, [row.stock, *row.paths]):
            first = timed is row.stock
            lines.append((
                row.variant if first else "",
                timed.path,
                _f(row.load_s, ".1f") if first else "",
                _f(timed.prepare_s, ".1f"),
                _f(timed.ttft_s, ".1f", 1000),
                _f(timed.decode_tok_s, ".1f"),
                _f(timed.ratio, ".2f"),
                _f(timed.floor_share, ".0f", 100),
                _f(row.resident_bytes, ",.0f", 1e-6) if first else "",
                _f(row.load_peak_bytes, ",.0f", 1e-6) if first else "",
                _f(timed.run_peak_bytes, ",.0f", 1e-6),
                _f(timed.joules_per_token, ".2f"),
            ))  # fmt: skip
    return head, lines


def _lines(rows: list[tuple[str, ...]]) -> str:
    return "".join("| " + " | ".join(cells) + " |\n" for cells in rows)


def profiles(report: Report) -> Iterator[str]:
    """A table a path that was profiled: its costliest kernels, and the rest in one line."""
    for row in report.rows:
        for timed in row.paths:
            if (found := timed.profile) is None:
                continue
            lines = [("kernel", "calls per step", "µs each", "ms per step", "% of all kernels"), ("---",) * 5]
            shown, rest = found.kernels[:SHOWN], found.kernels[SHOWN:]
            entries = [(k.name.replace("|", "\\|"), k.calls, k.seconds) for k in shown]
            if rest:
                entries.append(
                    (f"{len(rest)} more", sum(k.calls for k in rest), sum(k.seconds for k in rest))
                )
            for name, calls, seconds in entries:
                each = format(seconds / calls * 1e6, ".1f") if calls else "–"
                share = format(100 * seconds / found.busy_s, ".1f")
                lines.append((name, f"{calls:g}", each, format(seconds * 1e3, ".3f"), share))
            idle = max(0.0, found.step_s - found.covered_s)
            beside = (
                f" (all together {found.busy_s * 1e3:.2f} ms: some run on parallel streams)"
                if found.busy_s > 1.01 * found.covered_s
                else ""
            )
            yield (
                f"{row.variant}, {timed.path}: a step takes {found.step_s * 1e3:.2f} ms, in {found.covered_s * 1e3:.2f} ms "
                f"of it kernels run{beside}; {idle * 1e3:.2f} ms lie between them.\n\n{_lines(lines)}"
            )


def remarks(report: Report) -> Iterator[str]:
    options = report.options
    yield (
        f"{report.model}, {report.parameters / 1e9:.2f} B parameters; prompt {options.prompt_tokens}, "
        f"{options.new_tokens} new tokens, batch {options.batch}, greedy, median of {options.pairs} alternating pairs. MB is 10^6 bytes."
    )
    shown = report.environment
    packages = ", ".join(f"{k} {v}" for k, v in shown.packages.items())
    yield f"{shown.device}, driver {shown.driver or '–'}, Python {shown.python}, {packages}."
    if report.copy_bytes_s:
        yield f"A copy on this device moves {report.copy_bytes_s / 1e12:.2f} TB/s (read plus written)."
    for row in report.rows:
        if row.error:
            yield f"{row.variant}: {row.error}"
        if row.floor_tok_s:
            yield f"{row.variant}: a step reads {row.step_bytes / 1e9:.2f} GB, so the roofline is {row.floor_tok_s:.0f} tok/s."
        if row.ttft:
            t = row.ttft
            yield (
                f"{row.variant}: at prompt {t['prompt_tokens']}, TTFT {t['ttft_s'] * 1000:.1f} ms, bare forward "
                f"{t['bare_forward_s'] * 1000:.1f} ms, ratio {t['ratio']:.3f}."
            )
        for timed in row.paths:
            yield f"{row.variant}, {timed.path}: {timed.error or timed.check}"
        if row.left_after_unload_bytes is not None and report.device.startswith("cuda"):
            yield f"{row.variant}: {row.left_after_unload_bytes / 1e6:.1f} MB more allocated after unloading than before."


def _f(value: float | None, form: str, scale: float = 1.0) -> str:
    return "–" if value is None else format(value * scale, form)
