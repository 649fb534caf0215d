"""Prompt → token ids, token ids → text as it streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comparator.core.errors import UserError
from comparator.core.messages import Prompt
from comparator.core.request import DEFAULT_TEMPLATE, ChatTemplate
from comparator.core.result import Thinking
from comparator.decoding import chat_template


def encode(
    tokenizer: Any,
    prompt: str,
    system: str | None,
    chat: bool | None,
    template: ChatTemplate = DEFAULT_TEMPLATE,
    history: tuple[tuple[str, str], ...] = (),
) -> Prompt:
    """The prompt's token ids. `chat`: whether to use the chat template; None: where the tokenizer has one. `history`: (role,
    content) of the turns between the system prompt and this one.

    Without a template the system prompt stands before the prompt, a blank line between. The ids begin with one
    beginning-of-sequence token at most. Raises `UserError` for an empty prompt, and where `chat_template.render` does.
    """
    if not prompt.strip():
        raise UserError("The prompt is empty.", "Enter a prompt.")
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if not has_template and (chat or template.name or template.variables):
        raise UserError(
            "This model has no chat template.", "Turn the chat template off to send the raw text."
        )
    if chat is False and (template.name or template.variables):
        raise UserError("Template variables need the chat template.", "Turn it on, or leave them out.")
    if history and (chat is False or not has_template):
        raise UserError(
            "A conversation of several turns needs the model's chat template.",
            "Choose a model that has one, and turn it on, or give single prompts.",
        )
    messages = (*([("system", system)] if system else []), *history, ("user", prompt))
    if chat is False or not has_template:
        text = f"{system}\n\n{prompt}" if system else prompt
        ids = _one_bos(tokenizer, tokenizer(text)["input_ids"])
        if not ids:
            raise UserError("The prompt has no tokens for this model.", "Type something longer.")
        return Prompt(ids, False, text=text, messages=messages)
    text = chat_template.render(tokenizer, prompt, system, template, history)
    ids = _one_bos(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    return Prompt(ids, True, chat_template.opened(text), text, messages)


def _one_bos(tokenizer: Any, ids: list[int]) -> tuple[int, ...]:
    """Without a second beginning-of-sequence token, which a template and a tokenizer that both add one would make."""
    start = 0
    while len(ids) > start + 1 and ids[start] == ids[start + 1] == tokenizer.bos_token_id:
        start += 1
    return tuple(ids[start:])


def thinking(tokenizer: Any, ids: Sequence[int], text: str, opened: str) -> Thinking | None:
    """Where in an answer the thinking ends; None where it has none. `opened`: the tag that the template printed."""
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    begin = opened + whole.lstrip()
    closing = next((closing for opening, closing in chat_template.TAGS if begin.startswith(opening)), None)
    if closing is None:
        return None
    low, high = 0, len(ids)  # the fewest tokens whose text has the closing tag, else all
    while low < high and closing in whole:
        middle = (low + high) // 2
        if closing in tokenizer.decode(ids[:middle], skip_special_tokens=False):
            high = middle
        else:
            low = middle + 1
    before = tokenizer.decode(ids[:high], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Thinking(high, len(before) if text.startswith(before) else len(text), opened)


class TextStream:
    """Incremental decoding of token ids to text; the pieces add up to `decode` of all ids.

    A token may be part of a character or change the spacing of the one before it, so text is delayed until
    it can no longer change.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.emitted = ""
        self._start = 0  # decode from here: a few tokens of context
        self._base = ""  # text of the tokens from _start that has been returned

    def push(self, token: int) -> str:
        self.ids.append(token)
        window = self._decode(self.ids[self._start :])
        if window.endswith("�") or not window.startswith(self._base):
            return ""
        piece = window[len(self._base) :]
        self.emitted += piece
        self._base = window
        if len(self.ids) - self._start > 24:  # keep decoding cheap: quadratic otherwise
            self._start = len(self.ids) - 8
            self._base = self._decode(self.ids[self._start :])
        return piece

    def finish(self) -> tuple[str, str]:
        """(the text that `push` has not returned, the whole text)."""
        text = self._decode(self.ids)
        remainder = text[len(self.emitted) :] if text.startswith(self.emitted) else ""
        return remainder, text

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
