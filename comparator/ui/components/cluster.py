"""A Ray cluster on the page: the head line, and under “In memory” its nodes with who holds what. Pure."""

from __future__ import annotations

from comparator import words
from comparator.types import EngineState, NodeState, Resident
from comparator.ui.markup import code, esc


def shown(state: EngineState | None) -> bool:
    """Whether there is a cluster to show, or one to miss."""
    return state is not None and bool(state.nodes or state.problem)


def head(state: EngineState, busy: str) -> list[str]:
    """Parts of the head line: how many machines and devices, and what is free on them."""
    if state.problem and not state.nodes:
        return [f"<b>{esc(state.problem.problem)}</b>", esc(state.problem.advice)]
    usable = [n for n in state.nodes if not n.refused]
    count = sum(len(n.devices) for n in usable)
    parts = [f"<b>{esc(state.device)}</b>", esc(words.plural(count, "device"))]
    free = sum(d.free_bytes or 0 for n in usable for d in n.devices)
    parts.append(esc(f"{free / 1e9:,.1f} GB free"))
    if state.budget_bytes:
        parts.append(esc(f"budget {state.budget_bytes / 1e9:,.1f} GB a node"))
    if refused := len(state.nodes) - len(usable):
        parts.append(esc(f"{words.plural(refused, 'node')} refused"))
    return [*parts, busy]


def desk(state: EngineState) -> str:
    """Each node with its devices, what is free there, and the variants it holds."""
    if not state.nodes:
        return f'<p class="facts bad">{esc(state.problem.problem)} {esc(state.problem.advice)}</p>'
    return "".join(_node(n, [r for r in state.residents if r.node == n.name]) for n in state.nodes)


def _node(node: NodeState, residents: list[Resident]) -> str:
    lines = "".join(
        f"<li>{code(held.variant)}<span>{esc(words.megabytes(held.bytes))}</span></li>" for held in residents
    )
    held = f'<ul class="residents">{lines}</ul>' if lines else ""
    if node.refused:
        return f'<p class="facts"><b>{esc(node.name)}</b> <span class="bad">is not used: {esc(node.refused)}</span></p>'
    devices = "".join(
        f"<br>{esc(d.name)}: {esc(words.figure((d.free_bytes or 0) / 1e9))} of "
        f"{esc(words.figure((d.total_bytes or 0) / 1e9))} GB free"
        for d in node.devices
    )
    return f'<p class="facts"><b>{esc(node.name)}</b>{devices}</p>{held}'
