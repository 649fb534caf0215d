"""The History tab: what was measured before. Search, reopen, rename, delete with undo, lay side by side.

The list is HTML that recordings.js listens to; what comes back from the browser (ids, names) is judged by the store,
which also knows whose a comparison is. Knows nothing of how a comparison is shown.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from comparator import words
from comparator.store import Entry
from comparator.types import Problem
from comparator.ui.components import recording, side_by_side, upload
from comparator.ui.desk import owner_of
from comparator.ui.markup import code, esc, note
from comparator.ui.page import DIRECT, PRIVATE, Page

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
        said = gr.HTML("", elem_id="history-said", apply_default_css=False,
                       js_on_load="qc.said(element, trigger)")  # fmt: skip
        entries = gr.HTML(
            note("Nothing here yet."),
            elem_id="history",
            apply_default_css=False,
            js_on_load="qc.history(element, trigger, watch)",
        )
        compared = gr.HTML("", elem_id="side-by-side", apply_default_css=False)
    start = gr.State(0)
    chosen = gr.State([])
    asked = [page.owner, search, start]

    def show(owner: str, query: str, offset: int) -> str:
        return listing(page, owner, query, offset)

    def find(owner: str, query: str):
        return listing(page, owner, query, 0), 0

    def turn(owner: str, query: str, event: gr.EventData):
        offset = _offset(event._data)
        return listing(page, owner, query, offset), offset

    def rename(owner: str, query: str, offset: int, event: gr.EventData):
        def work(id: str) -> str:
            page.desk.store.rename(id, str(event._data.get("name") or ""), owner_of(owner))
            return say("Renamed.")

        return changed(page, work, event, owner, query, offset)

    def delete(owner: str, query: str, offset: int, event: gr.EventData):
        def work(id: str) -> str:
            page.desk.store.delete(id, owner_of(owner))
            return say("Deleted; its link opens nothing now.", undo=id)

        return changed(page, work, event, owner, query, offset)

    def undo(owner: str, query: str, offset: int, event: gr.EventData):
        def work(id: str) -> str:
            page.desk.store.undelete(id, owner_of(owner))
            return say("It is back, and so is its link.")

        return changed(page, work, event, owner, query, offset)

    def reopen(owner: str, event: gr.EventData, request: gr.Request) -> list[Any]:
        return reopened(page, _id(event), request)

    def mark(event: gr.EventData):
        ids = _ids(event._data)
        return ids, gr.Button(
            f"Side by side ({len(ids)})" if ids else "Side by side", interactive=len(ids) >= 2
        )

    def lay_out(ids: list[str]) -> str:
        return beside_each_other(page, ids)

    def refresh(event) -> None:
        event.then(show, inputs=asked, outputs=[entries], **DIRECT)

    page.refresh_history = refresh
    # One listener for both, so that a slow answer to opening the tab never overtakes what was typed since.
    gr.on(
        [tab.select, search.change],
        find,
        inputs=[page.owner, search],
        outputs=[entries, start],
        trigger_mode="always_last",
        **DIRECT,
    )
    opened = entries.select(reopen, inputs=[page.owner], outputs=recording.outputs(page), **DIRECT)
    opened.then(None, js="() => qc.top()", api_visibility="private")
    recording.settle(page, opened)
    entries.edit(rename, inputs=asked, outputs=[said, entries], **DIRECT)
    entries.delete(delete, inputs=asked, outputs=[said, entries], **DIRECT)
    entries.input(mark, outputs=[chosen, beside], **DIRECT)
    entries.submit(turn, inputs=[page.owner, search], outputs=[entries, start], **DIRECT)
    said.undo(undo, inputs=asked, outputs=[said, entries], **DIRECT)
    beside.click(lay_out, inputs=[chosen], outputs=[compared], **PRIVATE).then(
        None, js="() => qc.into('#side-by-side')", api_visibility="private"
    )
    upload.wire(page, file, refresh)


# ---------------------------------------------------------------- what the list does


def changed(page: Page, work, event: gr.EventData, owner: str, query: str, offset: int) -> tuple[str, str]:
    """Do it, say so, and list again; or say what stood in the way."""
    try:
        done = work(_id(event))
    except Problem as problem:
        done = say_problem(problem)
    return done, listing(page, owner, query, offset)


def reopened(page: Page, id: str, asker: Any) -> list[Any]:
    """The values of `recording.outputs` for one entry of the list."""
    try:
        if page.runs.going(getattr(asker, "session_hash", None)):
            raise recording.BUSY
        store = page.desk.store
        comparison = store.load(id)
        return recording.values(page, comparison, asker, imported=store.entry(id).imported)
    except Problem as problem:
        return recording.refusal(page, problem, keep=True)


def beside_each_other(page: Page, ids: list[str]) -> str:
    """Two or more of the same prompt, as HTML; or why not."""
    try:
        if len(ids) < 2:
            raise Problem("Fewer than two comparisons are ticked.", "Tick two or more of the same prompt.")
        if len(ids) > MOST_SIDE_BY_SIDE:
            raise Problem(f"{len(ids)} comparisons are ticked.", f"Tick up to {MOST_SIDE_BY_SIDE}.")
        store = page.desk.store
        if len({store.entry(id).prompt_key for id in ids}) > 1:
            raise Problem(
                "These comparisons have different prompts, so their answers cannot be compared.",
                "Tick comparisons of one prompt: search for a few of its words.",
            )
        # The oldest first: it is what the others are compared with. The list has the newest first.
        return side_by_side.render(sorted(map(store.load, reversed(ids)), key=lambda c: c.created_at))
    except Problem as problem:
        return say_problem(problem)


# ---------------------------------------------------------------- how it looks


def listing(page: Page, owner: str, query: str, offset: int) -> str:
    """One page of the history as HTML."""
    mine = owner_of(owner)
    query = str(query or "")[:1000]
    try:
        store = page.desk.store
        found = store.search(query, mine, limit=PAGE_SIZE, offset=offset)
        total = store.count(query, mine)
        status = store.status
    except Problem as problem:
        return say_problem(problem)
    lasting = f'<p class="durability">{esc(status)}</p>' if status else ""
    if not found:
        return lasting + note(esc(_empty(page, query, total)))
    rows = "".join(row(entry) for entry in found)
    whose = "made in this browser" if page.settings.public else "kept on this machine"
    count = f"{words.plural(total, 'comparison')} {'found' if query.strip() else whose}"
    return (
        f'{lasting}<p class="soft history-count">{esc(count)}. Tick two or more of one prompt to lay them side by side.'
        f'</p><ul class="history">{rows}</ul>{_pages(offset, total)}'
    )


def _empty(page: Page, query: str, total: int) -> str:
    if query.strip():
        return "Nothing fits these words. Every word has to occur in the model, variants, prompt, name, device or date."
    if total:
        return "There is nothing on this page of the list; go back to the first."
    if page.settings.public:
        return "Nothing here yet. What you run is listed here, for this browser alone."
    return "Nothing here yet. Every comparison that finishes is saved and listed here."


def row(entry: Entry) -> str:
    """One comparison: tick, open, rename, delete."""
    prompt = entry.prompt.strip() or "(empty prompt)"
    heading = entry.name or prompt
    below = f'<span class="history-prompt">{esc(prompt)}</span>' if entry.name else ""
    made = f"{recording.when(entry.created_at)}{', from a file' if entry.imported else ''}"
    variants = " ".join(code(v) for v in entry.variants[:12])
    return (
        f'<li data-id="{esc(entry.id)}" data-key="{esc(entry.prompt_key)}"><input type="checkbox" class="tick" '
        f'aria-label="Tick for side by side: {esc(heading[:60])}"><div class="history-main">'
        f'<a class="open" href="?c={esc(entry.id)}">{esc(heading)}</a>{below}'
        f'<p class="history-facts">{esc(entry.model)} · {variants} · {esc(entry.device or "unknown device")} · '
        f"{esc(made)}</p></div>"
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


def say(text: str, undo: str = "") -> str:
    button = f' <button type="button" class="quiet" data-undo="{esc(undo)}">Undo</button>' if undo else ""
    return f'<p class="notice" role="status"><span>{esc(text)}</span>{button}</p>'


def say_problem(problem: Problem) -> str:
    return f'<p class="notice bad" role="alert"><span><b>{esc(problem.problem)}</b> {esc(problem.advice)}</span></p>'


# ---------------------------------------------------------------- what came from the browser


def _id(event: gr.EventData) -> str:
    data = event._data
    return str(data.get("id") if isinstance(data, dict) else "")[:100]


def _ids(data: Any) -> list[str]:
    given = data.get("ids") if isinstance(data, dict) else None
    return (
        list(dict.fromkeys(i[:100] for i in given if isinstance(i, str)))[:100]
        if isinstance(given, list)
        else []
    )


def _offset(data: Any) -> int:
    try:
        return max(0, min(int(data.get("offset", 0)), 10_000_000))
    except (TypeError, ValueError, AttributeError, OverflowError):
        return 0
