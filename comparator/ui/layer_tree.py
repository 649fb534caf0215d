"""Layer rows → a tree by block: embedding, the blocks with their attention, MLP and norms, head. Plain data, without HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from comparator.core.result import LayerRow
from comparator.ui.layer_summary import Difference

EMBEDDING, ATTENTION, MLP, NORMS, OTHER, HEAD = "Embedding", "Attention", "MLP", "Norms", "Other", "Head"
PARTS = (EMBEDDING, ATTENTION, MLP, NORMS, OTHER, HEAD)

# Names of transformers' models and of GGUF files. The first number in a name is the block's.
_BLOCK = re.compile(r"^(?P<stack>.*?(?:^|\.)(?:layers?|h|blocks?|blk))\.(?P<number>\d+)\.(?P<rest>.+)$")
_OF_A_PART = (
    (NORMS, re.compile(r"norm|(?:^|[._])ln_")),
    (ATTENTION, re.compile(r"attn|attention|[qkvo]_proj|qkv")),
    (
        MLP,
        re.compile(r"mlp|ffn|feed_forward|expert|moe|fc\d|(?:up|gate|down)_proj|intermediate|output\.dense"),
    ),
)
_HEAD = re.compile(r"^(?:.*\.)?(?:lm_head|embed_out|score|classifier)\.|^output\.")
_EMBEDDING = re.compile(r"embe?d|(?:^|\.)w[tp]e\.")


@dataclass(frozen=True)
class Node:
    """A group of tensors; the figures are sums over it.

    key: stays the same when the tensors are filtered. pairs: each tensor in the column and in the one it is compared with.
    """

    title: str
    key: str
    pairs: tuple[Difference, ...]
    children: tuple[Node, ...] = ()

    @property
    def rows(self) -> list[LayerRow]:
        return [pair.left for pair in self.pairs if pair.left]

    @property
    def others(self) -> list[LayerRow]:
        return [pair.right for pair in self.pairs if pair.right]

    @property
    def changed(self) -> int:
        """How many tensors the two columns store differently."""
        return sum(not pair.same for pair in self.pairs)


def size(rows: Iterable[LayerRow]) -> int:
    """Bytes with quant state. A tied row has none of its own."""
    return sum(row.bytes + row.quant_state_bytes for row in rows)


def part_of(name: str, module_class: str = "") -> str:
    """Which of PARTS a tensor belongs to, by its name."""
    block = _BLOCK.match(name)
    if block is None:
        if _HEAD.search(name):
            return HEAD
        if _EMBEDDING.search(name) or module_class.endswith("Embedding"):
            return EMBEDDING
    rest = block["rest"] if block else name
    return next((part for part, words in _OF_A_PART if words.search(rest)), OTHER)


def tree(pairs: Sequence[Difference]) -> list[Node]:
    """Embedding, blocks in their order, what belongs to none, head. A block's children are its parts."""
    outside: dict[str, list[Difference]] = {}
    blocks: dict[tuple[str, int], list[Difference]] = {}
    for pair in pairs:
        if match := _BLOCK.match(pair.name):
            blocks.setdefault((match["stack"], int(match["number"])), []).append(pair)
        else:
            outside.setdefault(_part(pair), []).append(pair)
    several = len({stack for stack, _ in blocks}) > 1  # an encoder and a decoder, say
    inner = [
        Node(
            f"Block {number}" + (f" of {stack}" if several else ""),
            f"{stack}.{number}",
            tuple(members),
            tuple(parts(members, f"{stack}.{number}.")),
        )
        for (stack, number), members in blocks.items()
    ]
    groups = {part: Node(part, part, tuple(members)) for part, members in outside.items()}
    first = [groups.pop(EMBEDDING)] if EMBEDDING in groups else []
    return [*first, *inner, *(groups[part] for part in PARTS if part in groups)]


def parts(pairs: Iterable[Difference], prefix: str = "") -> list[Node]:
    """The sums by part, over whatever blocks the tensors are in."""
    members: dict[str, list[Difference]] = {}
    for pair in pairs:
        members.setdefault(_part(pair), []).append(pair)
    return [Node(part, prefix + part, tuple(members[part])) for part in PARTS if part in members]


def leaf_name(name: str) -> tuple[str, str]:
    """("model.layers.0.", "self_attn.q_proj.weight"): what the tree says already, and the rest."""
    match = _BLOCK.match(name)
    return (name[: -len(match["rest"])], match["rest"]) if match else ("", name)


def _part(pair: Difference) -> str:
    row = pair.left or pair.right
    return part_of(pair.name, row.module_class if row else "")
