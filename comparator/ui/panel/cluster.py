"""A Ray cluster on the page: parts of the header line, and its nodes with their resident variants."""

from __future__ import annotations

from comparator.core.state import EngineState, NodeState, Resident
from comparator.ui.markup import code, esc
from comparator.util import formatting


def shown(state: EngineState | None) -> bool:
    """Whether a cluster is connected, or it (or the GPU) cannot be used."""
    return state is not None and bool(state.nodes or state.problem)


def head(state: EngineState, busy: str) -> list[str]:
    """Parts of the header line: the number of devices, and their free memory."""
    if state.problem and not state.nodes:
        return [f"<b>{esc(state.problem.problem)}</b>", esc(state.problem.advice)]
    usable = [n for n in state.nodes if not n.refused]
    count = sum(len(n.devices) for n in usable)
    parts = [f"<b>{esc(state.device)}</b>", esc(formatting.plural(count, "device"))]
    free = sum(d.free_bytes or 0 for n in usable for d in n.devices)
    parts.append(esc(f"{free / 1e9:,.1f} GB free"))
    if state.budget_bytes:
        parts.append(esc(f"budget {state.budget_bytes / 1e9:,.1f} GB per node"))
    if refused := len(state.nodes) - len(usable):
        parts.append(esc(f"{formatting.plural(refused, 'node')} refused"))
    return [*parts, busy]


def nodes(state: EngineState) -> str:
    """Each node with its devices, their free memory, and its resident variants."""
    if not state.nodes:
        return f'<p class="facts bad">{esc(state.problem.problem)} {esc(state.problem.advice)}</p>'
    return "".join(_node(n, [r for r in state.residents if r.node == n.name]) for n in state.nodes)


def _node(node: NodeState, residents: list[Resident]) -> str:
    lines = "".join(
        f"<li>{code(resident.variant)}<span>{esc(formatting.megabytes(resident.bytes))}</span></li>"
        for resident in residents
    )
    listed = f'<ul class="residents">{lines}</ul>' if lines else ""
    if node.refused:
        return f'<p class="facts"><b>{esc(node.name)}</b> <span class="bad">not used: {esc(node.refused)}</span></p>'
    devices = "".join(
        f"<br>{esc(d.name)}: {esc(formatting.figure((d.free_bytes or 0) / 1e9))} of "
        f"{esc(formatting.figure((d.total_bytes or 0) / 1e9))} GB free"
        for d in node.devices
    )
    return f'<p class="facts"><b>{esc(node.name)}</b>{devices}</p>{listed}'
