"""The History tab: earlier comparisons. Search, reopen, rename, delete with undo, view side by side.

The list is HTML with its script in recordings.js. The store validates the ids and names that the browser sends, and
knows the owner of each comparison.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from comparator.core.errors import UserError
from comparator.store import Entry
from comparator.ui.admission import owner_of
from comparator.ui.gradio_compat import event_data
from comparator.ui.markup import code, esc, note
from comparator.ui.page import DIRECT, PRIVATE, Page, html
from comparator.ui.results import saved_comparison, side_by_side, upload
from comparator.util import formatting

PAGE_SIZE = 50
MOST_SIDE_BY_SIDE = 6


def build(page: Page) -> None:
    with gr.Tab("History", id="history") as tab:
        with gr.Row(elem_classes="history-bar"):
            search = gr.Textbox(
                "",
                label="Search",
                show_label=False,
                placeholder="Search by model, variant, prompt, name, device or date",
                lines=1,
                max_lines=1,
                elem_id="history-search",
            )
            beside = gr.Button(
                "Side by side", size="sm", scale=0, interactive=False, elem_id="history-beside"
            )
            file = upload.button(page)
        status = html(elem_id="history-said",
                       js_on_load="qc.said(element, trigger)")  # fmt: skip
        entries = html(
            note("No comparisons yet."), elem_id="history", js_on_load="qc.history(element, trigger, watch)"
        )
        compared = html(elem_id="side-by-side")
        start = gr.State(0)
        chosen = gr.State([])
    query_inputs = [page.owner, search, start]

    def show(owner: str, query: str, offset: int) -> str:
        return listing(page, owner, query, offset)

    def find(owner: str, query: str):
        return listing(page, owner, query, 0), 0

    def turn(owner: str, query: str, event: gr.EventData):
        offset = _offset(event_data(event))
        return listing(page, owner, query, offset), offset

    def rename(owner: str, query: str, offset: int, event: gr.EventData):
        def work(id: str) -> str:
            page.admission.store.rename(id, str(event_data(event).get("name") or ""), owner_of(owner))
            return say("Renamed.")

        return changed(page, work, event, owner, query, offset)

    def delete(owner: str, query: str, offset: int, event: gr.EventData):
        def work(id: str) -> str:
            page.admission.store.delete(id, owner_of(owner))
            return say(
                f"Deleted. Its link no longer works. {_until(page.settings.purge_days)}".strip(), undo=id
            )

        return changed(page, work, event, owner, query, offset)

    def undo(owner: str, query: str, offset: int, event: gr.EventData):
        def work(id: str) -> str:
            page.admission.store.undelete(id, owner_of(owner))
            return say("Restored. Its link works again.")

        return changed(page, work, event, owner, query, offset)

    def reopen(owner: str, event: gr.EventData, request: gr.Request) -> list[Any]:
        return reopened(page, _id(event), request)

    def mark(event: gr.EventData):
        ids = _ids(event_data(event))
        return ids, gr.Button(
            f"Side by side ({len(ids)})" if ids else "Side by side", interactive=len(ids) >= 2
        )

    def lay_out(ids: list[str]) -> str:
        return beside_each_other(page, ids)

    def refresh(event) -> None:
        event.then(show, inputs=query_inputs, outputs=[entries], **DIRECT)

    page.refresh_history = refresh
    # One listener for both, so that a slow response to opening the tab never overwrites a later search.
    gr.on(
        [tab.select, search.change],
        find,
        inputs=[page.owner, search],
        outputs=[entries, start],
        trigger_mode="always_last",
        **DIRECT,
    )
    opened = entries.select(reopen, inputs=[page.owner], outputs=saved_comparison.outputs(page), **DIRECT)
    opened.then(None, js="() => qc.top()", api_visibility="private")
    saved_comparison.settle(page, opened)
    entries.edit(rename, inputs=query_inputs, outputs=[status, entries], **DIRECT)
    entries.delete(delete, inputs=query_inputs, outputs=[status, entries], **DIRECT)
    # Of two boxes that are ticked while the first is being answered, the second counts too.
    entries.input(mark, outputs=[chosen, beside], trigger_mode="multiple", **DIRECT)
    entries.submit(turn, inputs=[page.owner, search], outputs=[entries, start], **DIRECT)
    status.undo(undo, inputs=query_inputs, outputs=[status, entries], **DIRECT)
    beside.click(lay_out, inputs=[chosen], outputs=[compared], **PRIVATE).then(
        None, js="() => qc.into('#side-by-side')", api_visibility="private"
    )
    upload.wire(page, file, refresh)


# ---------------------------------------------------------------- what the list does


def changed(page: Page, work, event: gr.EventData, owner: str, query: str, offset: int) -> tuple[str, str]:
    """Run `work` and list again; returns its message or the error, and the list."""
    try:
        done = work(_id(event))
    except UserError as problem:
        done = say_problem(problem)
    return done, listing(page, owner, query, offset)


def reopened(page: Page, id: str, asker: Any) -> list[Any]:
    """The values of `saved_comparison.outputs` for one entry of the list."""
    try:
        if page.runs.going(getattr(asker, "session_hash", None)):
            raise saved_comparison.BUSY
        store = page.admission.store
        comparison = store.load(id)
        return saved_comparison.values(page, comparison, asker, imported=store.entry(id).imported)
    except UserError as problem:
        return saved_comparison.refusal(page, problem, keep=True)


def beside_each_other(page: Page, ids: list[str]) -> str:
    """Two or more comparisons of the same prompt as HTML, or the error."""
    try:
        if len(ids) < 2:
            raise UserError(
                "Fewer than two comparisons are selected.", "Select two or more with the same prompt."
            )
        if len(ids) > MOST_SIDE_BY_SIDE:
            raise UserError(f"{len(ids)} comparisons are selected.", f"Select at most {MOST_SIDE_BY_SIDE}.")
        store = page.admission.store
        if len({store.entry(id).prompt_key for id in ids}) > 1:
            raise UserError(
                "These comparisons have different prompts, so their answers cannot be compared.",
                "Select comparisons of one prompt: search for a few of its words.",
            )
        # The oldest first, which the others are compared with; the list has the newest first.
        return side_by_side.render(sorted(map(store.load, reversed(ids)), key=lambda c: c.created_at))
    except UserError as problem:
        return say_problem(problem)


# ---------------------------------------------------------------- how it looks


def listing(page: Page, owner: str, query: str, offset: int) -> str:
    """One page of the history as HTML."""
    visitor_key = owner_of(owner)
    query = str(query or "")[:1000]
    try:
        store = page.admission.store
        entries = store.search(query, visitor_key, limit=PAGE_SIZE, offset=offset)
        total = store.count(query, visitor_key)
        status = store.status
    except UserError as problem:
        return say_problem(problem)
    lasting = f'<p class="durability">{esc(status)}</p>' if status else ""
    if not entries:
        return lasting + note(esc(_empty(page, query, total)))
    rows = "".join(row(entry) for entry in entries)
    whose = "from this browser" if page.settings.public else "on this machine"
    count = f"{formatting.plural(total, 'comparison')} {'found' if query.strip() else whose}"
    if page.settings.public and (days := page.settings.retention_days):
        count += f". Those without a name are removed {formatting.plural(days, 'day')} after they were saved"
    return (
        f'{lasting}<p class="soft history-count">{esc(count)}. Select two or more with the same prompt to view them side by side.'
        f'</p><ul class="history">{rows}</ul>{_pages(offset, total)}'
    )


def _empty(page: Page, query: str, total: int) -> str:
    if query.strip():
        return "No matches. Every word must occur in the model, variants, prompt, name, device or date."
    if total:
        return "This page of the list is empty; go back to the first."
    if page.settings.public:
        return "No comparisons yet. Those you run are listed here, visible only in this browser."
    return "No comparisons yet. Every finished comparison is saved and listed here."


def row(entry: Entry) -> str:
    """One comparison: select, open, rename, delete."""
    prompt = entry.prompt.strip() or "(empty prompt)"
    heading = entry.name or prompt
    below = (
        f'<span class="history-prompt" title="{esc(prompt[:300])}">{esc(prompt)}</span>' if entry.name else ""
    )
    when_made = f"{saved_comparison.when(entry.created_at)}{', from a file' if entry.imported else ''}"
    variants = " ".join(code(v) for v in entry.variants[:12])
    return (
        f'<li data-id="{esc(entry.id)}" data-key="{esc(entry.prompt_key)}"><input type="checkbox" class="tick" '
        f'aria-label="Select for side by side: {esc(heading[:60])}"><div class="history-main">'
        f'<a class="open" href="?c={esc(entry.id)}" title="{esc(heading[:300])}">{esc(heading)}</a>{below}'
        f'<p class="history-facts">{esc(entry.model)} · {variants} · {esc(entry.device or "unknown device")} · '
        f"{esc(when_made)}</p></div>"
        f'<div class="history-acts"><button type="button" class="quiet" data-rename="{esc(entry.name)}">Rename</button>'
        f'<button type="button" class="quiet" data-delete aria-label="Delete {esc(heading[:60])}">Delete</button>'
        "</div></li>"
    )


def _pages(offset: int, total: int) -> str:
    if total <= PAGE_SIZE and not offset:
        return ""
    last = min(offset + PAGE_SIZE, total)
    return (
        f'<p class="history-pages"><button type="button" class="quiet" data-offset="{max(0, offset - PAGE_SIZE)}"'
        f"{'' if offset else ' disabled'}>Newer</button><span>{offset + 1:,} to {last:,} of {total:,}</span>"
        f'<button type="button" class="quiet" data-offset="{offset + PAGE_SIZE}"{"" if last < total else " disabled"}>'
        "Older</button></p>"
    )


def _until(days: int) -> str:
    return f"It is removed permanently {formatting.plural(days, 'day')} from now." if days else ""


def say(text: str, undo: str = "") -> str:
    button = f' <button type="button" class="quiet" data-undo="{esc(undo)}">Undo</button>' if undo else ""
    return f'<p class="notice" role="status"><span>{esc(text)}</span>{button}</p>'


def say_problem(problem: UserError) -> str:
    return f'<p class="notice bad" role="alert"><span><b>{esc(problem.problem)}</b> {esc(problem.advice)}</span></p>'


# ---------------------------------------------------------------- what came from the browser


def _id(event: gr.EventData) -> str:
    data = event_data(event)
    return str(data.get("id") if isinstance(data, dict) else "")[:100]


def _ids(data: Any) -> list[str]:
    ids = data.get("ids") if isinstance(data, dict) else None
    return (
        list(dict.fromkeys(i[:100] for i in ids if isinstance(i, str)))[:100] if isinstance(ids, list) else []
    )


def _offset(data: Any) -> int:
    try:
        return max(0, min(int(data.get("offset", 0)), 10_000_000))
    except (TypeError, ValueError, AttributeError, OverflowError):
        return 0
