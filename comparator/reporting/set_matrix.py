"""A prompt set's matrix, prompts × columns, as HTML: the same on the page and in HTML reports.

Opening a row shows the prompt and its answers; no script is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from comparator.core.prompt_set import Message, SetPrompt
from comparator.core.result import Comparison
from comparator.reporting import prompt_set
from comparator.reporting.prompt_set import Row
from comparator.util import formatting
from comparator.util.templates import environment

TEMPLATES = Path(__file__).with_name("templates")
LONGEST = 20_000  # characters of a text that are shown; the JSON document and the CSV have all


def render(comparison: Comparison, rows: Sequence[Row]) -> str:
    """HTML of these rows, in their order; "" without any."""
    if not rows:
        return ""
    template = environment(TEMPLATES).get_template("prompt_set.html")
    return template.render(
        rows=rows, labels=[c.label for c in comparison.cells], turns=_turns, say=prompt_set, cut=_cut
    )


def _turns(prompt: SetPrompt) -> list[tuple[str, str]]:
    """(who speaks, what) of every turn, the system prompt first."""
    messages = [("system", prompt.system)] if prompt.system else []
    for message in (*prompt.history, Message("user", prompt.text)):
        if messages and messages[-1][0] == message.role == "user":
            messages.append(("assistant", "(each variant's own answer)"))
        messages.append((message.role, message.content))
    return messages


def _cut(text: str) -> str:
    rest = len(text) - LONGEST
    return text if rest <= 0 else f"{text[:LONGEST]}… ({formatting.plural(rest, 'more character')})"
