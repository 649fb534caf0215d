"""The tensors of a column as an HTML table: a tree by block (layer_tree.py), filtered, beside another column's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from comparator.core.result import CellResult, LayerRow
from comparator.ui import layer_summary, layer_tree
from comparator.ui.markup import compared, esc, render, sized
from comparator.util import formatting

MOST_ROWS = 600  # all tensors of a large mixture of experts would be tens of megabytes of HTML


@dataclass(frozen=True)
class Facet:
    """What tensors can be filtered by with chips."""

    title: str
    of: Callable[[LayerRow], str]


FACETS = (
    Facet("Method", lambda row: row.logical_dtype),
    Facet("Storage", lambda row: row.storage_dtype),
    Facet("Device", lambda row: row.device),
)


@dataclass(frozen=True)
class Filter:
    """Which tensors are listed: those with every word of `query`, and of each facet one of the chosen values, if any."""

    query: str = ""
    only_changed: bool = False
    chosen: tuple[tuple[str, ...], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.query.strip() or self.only_changed or any(self.chosen))

    def takes(self, pair: layer_summary.Difference) -> bool:
        rows = [row for row in (pair.left, pair.right) if row]
        if self.only_changed and pair.same:
            return False
        for facet, values in zip(FACETS, self.chosen, strict=False):
            if values and facet.of(rows[0]) not in values:
                return False
        return not self.query or layer_summary.matches(" ".join(map(_searchable, rows)), self.query)


@dataclass(frozen=True)
class Column:
    """A column of the tree: what a tensor and what a group of tensors shows, as HTML. `title` may name the {other}."""

    title: str
    why: str
    tensor: Callable[[layer_summary.Difference], str]
    group: Callable[[layer_tree.Node], str] = lambda node: ""
    numeric: bool = False
    compares: bool = False  # shown only beside another column


def _of_left(cell: Callable[[LayerRow], str]) -> Callable[[layer_summary.Difference], str]:
    return lambda pair: cell(pair.left) if pair.left else ""


def _unbroken(text: str) -> str:
    """Text that stays on one line where its cell wraps."""
    return f'<span class="unbroken">{esc(text)}</span>'


def _dtype(row: LayerRow) -> str:
    return f"<code>{esc(row.storage_dtype)}</code> {_unbroken(layer_summary.shape(row.storage_shape))}"


def _shape(row: LayerRow) -> str:
    return f'<span title="{esc(row.logical_dtype)}">{esc(layer_summary.shape(row.shape))}</span>'


def _megabytes(pair: layer_summary.Difference) -> str:
    return _beside([pair.left] if pair.left else [], [pair.right] if pair.right else [])


def _beside(rows: list[LayerRow], others: list[LayerRow]) -> str:
    """Bytes, with their ratio to the other column's."""
    size_bytes = layer_tree.size(rows)
    if rows and all(row.tied_to for row in rows):
        return sized("tied", 0)
    return compared(small(size_bytes), formatting.ratio(size_bytes, layer_tree.size(others)), key=size_bytes)


def _state(row: LayerRow) -> str:
    parts = "; ".join(f"{s.name} {s.dtype} {layer_summary.shape(s.shape)}" for s in row.state)
    text = small(row.quant_state_bytes) if row.state else formatting.NONE
    return f'<span title="{esc(parts)}">{sized(text, row.quant_state_bytes)}</span>'


def _other(pair: layer_summary.Difference) -> str:
    if pair.right is None:
        return '<span class="soft">missing</span>'
    size_bytes = "tied" if pair.right.tied_to else f"{small(layer_tree.size([pair.right]))} MB"
    words = f"{layer_summary.in_words(pair.right)}; {pair.right.module_class}, {pair.right.param_class}"
    return f'<span title="{esc(words)}"><code>{esc(pair.right.logical_dtype)}</code> {_unbroken(size_bytes)}</span>'


def _others(node: layer_tree.Node) -> str:
    same = "the same" if not node.changed else f"{formatting.plural(node.changed, 'tensor')} differ"
    return f'<span class="soft">{esc(same)}</span>'


def bits(rows: list[LayerRow]) -> str:
    """Bits per weight of a group. A tied row has no bytes of its own and counts nowhere."""
    average = layer_summary.average_bits(row for row in rows if not row.tied_to)
    return sized(formatting.figure(average), average)


COLUMNS = (
    Column("Stored as", "hover for the class names",
           lambda pair: _storage_cell(pair.left), lambda node: esc(_dtypes(node))),
    Column("param.dtype", "storage dtype and storage shape", _of_left(_dtype)),
    Column("Shape", "logical shape; of a group its weights", _of_left(_shape),
           lambda node: f"{esc(formatting.parameters(sum(row.parameters for row in node.rows)))} weights"),
    Column("Compute", "compute dtype of the layer", _of_left(lambda row: f"<code>{esc(row.compute_dtype)}</code>")),
    Column("Bits", "bits per weight: 8 × (bytes + quant state) / parameters",
           _of_left(lambda row: sized(formatting.figure(row.bits_per_weight), row.bits_per_weight)),
           lambda node: bits(node.rows), numeric=True),
    Column("MB", "10^6 bytes, quant state included; × is the ratio to the variant beside it", _megabytes,
           lambda node: _beside(node.rows, node.others), numeric=True),
    Column("State, MB", "quant state", _of_left(_state),
           lambda node: sized(small(sum(r.quant_state_bytes for r in node.rows))), numeric=True),
    Column("Device", "", _of_left(lambda row: esc(row.device)),
           lambda node: esc(formatting.join(sorted({row.device for row in node.rows})))),
    Column("In {other}", "how the other variant stores it", _other, _others, compares=True),
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A row of the table. key, parent: which group it is, and in which it lies; percent: the length of its bar."""

    title: str
    name: str
    cells: list[Markup]
    level: int
    key: str
    parent: str
    percent: float
    path: str = ""
    group: bool = False
    changed: bool = False


def tensor_table(cell: CellResult, other: CellResult | None = None, wanted: Filter | None = None) -> str:
    """The tensors of a column that the filter takes, as a tree by block; with `other`, beside that column's."""
    wanted = wanted or Filter()
    alone = [layer_summary.Difference(row.name, row, None) for row in cell.layers]
    pairs = layer_summary.diff(cell, other) if other else alone
    matching = [pair for pair in pairs if wanted.takes(pair)]
    caption = _counted(len(matching), len(pairs), "tensor")
    if other:
        differ = sum(not pair.same for pair in pairs)
        verb = "differs" if differ == 1 else "differ"
        caption = (
            f"{differ:,} of {formatting.plural(len(pairs), 'tensor')} {verb} from {other.label}. {caption}"
        )
    several = len({row.device for row in cell.layers}) > 1
    columns = [c for c in COLUMNS if (other or not c.compares) and (several or c.title != "Device")]
    return render(
        "layer_tree.html",
        caption=caption,
        head=[
            ("Tensor", ""),
            *((c.title.format(other=other.label if other else ""), c.why) for c in columns),
        ],
        numeric={at for at, column in enumerate(columns, 1) if column.numeric},
        bar_at=next(at for at, column in enumerate(columns, 1) if column.title == "MB"),
        lines=_lines(layer_tree.tree(matching), columns, compares=other is not None),
        open=bool(wanted),
    )


def _lines(roots: list[layer_tree.Node], columns: list[Column], compares: bool) -> Iterator[Line]:
    """Groups and tensors from top to bottom; at most MOST_ROWS tensors, while the groups' sums have them all."""
    left = MOST_ROWS

    def walk(nodes: Sequence[layer_tree.Node], level: int, parent: str) -> Iterator[Line]:
        nonlocal left
        most = max((layer_tree.size(node.rows) for node in nodes), default=0) or 1
        for node in nodes:
            cells = [Markup(column.group(node)) for column in columns]
            share = 100 * layer_tree.size(node.rows) / most
            count = formatting.plural(len(node.pairs), "tensor")
            yield Line(
                node.title,
                count,
                cells,
                level,
                node.key,
                parent,
                share,
                "",
                True,
                compares and node.changed > 0,
            )
            if node.children:
                yield from walk(node.children, level + 1, node.key)
                continue
            members = node.pairs[:left]
            left -= len(members)
            largest = max((layer_tree.size([p.left]) for p in members if p.left), default=0) or 1
            for pair in members:
                path, title = layer_tree.leaf_name(pair.name)
                cells = [Markup(column.tensor(pair)) for column in columns]
                share = 100 * layer_tree.size([pair.left] if pair.left else []) / largest
                yield Line(
                    title,
                    pair.name,
                    cells,
                    level + 1,
                    "",
                    node.key,
                    share,
                    path,
                    False,
                    compares and not pair.same,
                )

    yield from walk(roots, 0, "")


def _dtypes(node: layer_tree.Node) -> str:
    """The logical dtypes of a group, that with the most weights first."""
    weights: Counter[str] = Counter()
    for row in node.rows:
        weights[row.logical_dtype] += row.parameters
    return ", ".join(name for name, _ in weights.most_common())


def _searchable(row: LayerRow) -> str:
    return " ".join(
        (row.name, layer_summary.in_words(row), row.module_class, row.param_class, row.storage_dtype, row.logical_dtype,
         row.compute_dtype, row.device, f"tied {row.tied_to}" if row.tied_to else "")
    )  # fmt: skip


def small(value: int | None) -> str:
    """MB with four decimals below 0.01, so that a norm of a kilobyte is not 0.00."""
    if value is None:
        return formatting.NONE
    return f"{value / 1e6:.4f}" if 0 < value < 1e4 else formatting.megabytes(value, unit=False)


def _storage_cell(row: LayerRow | None) -> str:
    if row is None:
        return '<span class="soft">missing</span>'
    words = f"tied to {row.tied_to}" if row.tied_to else layer_summary.in_words(row)
    return f'<span title="{esc(f"{row.module_class}, {row.param_class}")}">{esc(words)}</span>'


def _counted(matching: int, all_of_them: int, noun: str) -> str:
    if matching > MOST_ROWS:
        return f"The first {MOST_ROWS:,} of {formatting.plural(matching, noun)}; search to narrow down"
    if matching == all_of_them:
        return formatting.plural(matching, noun)
    return f"{matching:,} of {formatting.plural(all_of_them, noun)}"
