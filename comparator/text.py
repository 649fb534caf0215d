"""Prompt → token ids, token ids → text as it streams. Knows nothing of models."""

from __future__ import annotations

from typing import Any

from comparator.types import Problem


def encode(tokenizer: Any, prompt: str, system: str | None, chat: bool | None) -> tuple[list[int], bool]:
    """(token ids, whether the chat template was used). `chat` None: where the tokenizer has one.

    Without a template the system prompt stands before the prompt, a blank line between. Raises `Problem` for an
    empty prompt, a missing template, or one that takes no system prompt.
    """
    if not prompt.strip():
        raise Problem("The prompt is empty.", "Type something for the model to answer.")
    template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not template:
        raise Problem(
            "This model has no chat template.", "Switch the chat template off to send the text as it is."
        )
    use_chat = template if chat is None else chat
    if not use_chat:
        ids = tokenizer(f"{system}\n\n{prompt}" if system else prompt)["input_ids"]
        if not ids:
            raise Problem("The prompt has no tokens for this model.", "Type something longer.")
        return list(ids), False
    messages = ([{"role": "system", "content": system}] if system else []) + [
        {"role": "user", "content": prompt}
    ]
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # jinja2's TemplateError, or whatever a template raises
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        advice = "Leave the system prompt empty." if system else "Switch the chat template off."
        raise Problem(f"The model's chat template refused this conversation: {said}", advice) from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]), True


class TextStream:
    """Token ids in, text out, piece by piece; the pieces add up to `decode` of all ids.

    A token may be part of a character or change the spacing of the one before it, so text is held back until
    it can no longer change.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = ""
        self._start = 0  # decode from here: a few tokens of context
        self._base = ""  # text of the tokens from _start that has been shown

    def push(self, token: int) -> str:
        self.ids.append(token)
        window = self._decode(self.ids[self._start :])
        if window.endswith("�") or not window.startswith(self._base):
            return ""
        piece = window[len(self._base) :]
        self.shown += piece
        self._base = window
        if len(self.ids) - self._start > 24:  # keep decoding cheap: quadratic otherwise
            self._start = len(self.ids) - 8
            self._base = self._decode(self.ids[self._start :])
        return piece

    def finish(self) -> tuple[str, str]:
        """(what is still to be shown, the whole text)."""
        whole = self._decode(self.ids)
        rest = whole[len(self.shown) :] if whole.startswith(self.shown) else ""
        return rest, whole

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
