"""`compare`: the one endpoint that programs may call, over gradio_client, plain HTTP and MCP. docs/api.md shows how.

It goes through the same limits, the same line and the same store as the page. Knows nothing of how anything looks.
"""

from __future__ import annotations

import asyncio
import typing
from typing import Any, Literal

import gradio as gr

from comparator import lend
from comparator.api import request as build_request
from comparator.types import Comparison, Done, Problem
from comparator.ui.desk import Desk, link
from comparator.ui.page import Page


def build(page: Page) -> None:
    """Must be called inside the page's Blocks."""
    gr.api(endpoint(page.desk), api_name="compare", concurrency_limit=None)


def endpoint(desk: Desk):
    """The function as clients see it; its docstring and types are what they are told."""

    async def compare(
        prompt: str,
        variants: list[str] = ["bf16", "nf4"],  # noqa: B006 - shown to clients, never changed
        model: str = "",
        adapters: list[str] = [],  # noqa: B006
        system: str = "",
        chat: bool | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        repeats: int = 1,
        fidelity: Literal["none", "prompt", "text"] = "prompt",
        layers: bool = False,
        request: gr.Request = None,
    ) -> dict[str, Any]:
        """Run quantized variants of one language model on one prompt, one after another, and measure each of them.

        Args:
            prompt: What the model is to answer.
            variants: Notations such as bf16, int8, nf4, nf4:dq, fp4, gptq:4bit,g64; each becomes a column.
            model: A built-in name or user/name on the Hub; empty takes the server's own.
            adapters: LoRA adapters, user/name or built in; every variant also runs with each of them.
            system: A system prompt; empty takes none.
            chat: Whether to use the model's chat template; null uses it where there is one.
            max_new_tokens: The longest answer, in tokens.
            temperature: 0 is greedy.
            top_p: Keep the likeliest tokens up to this share; 1 is off.
            top_k: Keep this many of the likeliest tokens; 0 is off.
            repetition_penalty: 1 is off.
            seed: The same seed gives the same tokens on the same machine.
            repeats: Runs of each column, taking turns; the median is reported.
            fidelity: What each column is measured on against the reference: prompt (its answer), text (a longer text too) or none.
            layers: Whether to include one entry for every stored tensor of each column.

        Returns:
            id and url of the saved comparison (null if it could not be saved), and comparison, the comparison
            document: prompt, settings, environment, reference, and cells with text, latency, memory and fidelity.
        """
        try:
            asked = build_request(
                prompt, variants, model or None, adapters, system=system or None, chat=chat, fidelity=fidelity,
                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                repetition_penalty=repetition_penalty, seed=seed, repeats=repeats,
            )  # fmt: skip
            desk.admit(asked, request)
            comparison = await asyncio.to_thread(_drain, desk, asked)
        except Problem as problem:
            raise gr.Error(str(problem), print_exception=False) from None
        saved = desk.holds(comparison.id)
        return {
            "id": comparison.id if saved else None,
            "url": link(request, comparison.id) if saved else None,
            "comparison": as_data(comparison, layers),
        }

    compare.__annotations__ = typing.get_type_hints(compare)  # Gradio reads the return type as it stands
    return compare


def _drain(desk: Desk, asked) -> Comparison:
    import threading

    for event in desk.keep(asked, lend.compare(asked, threading.Event()), None):
        if isinstance(event, Done):
            return event.comparison
    raise Problem("The comparison ended before it was complete.", "Try again.")


def as_data(comparison: Comparison, layers: bool) -> dict[str, Any]:
    """The document as plain JSON data; without `layers`, its longest part by far is left out."""
    data = comparison.to_dict()
    if not layers:
        for cell in data["cells"]:
            del cell["layers"]
    return data


def mcp_installed() -> bool:
    """Whether Gradio's extra for MCP is there and works with what else is installed."""
    import importlib.util

    if importlib.util.find_spec("mcp") is None:
        return False
    try:
        import gradio.mcp  # noqa: F401 - what `launch(mcp_server=True)` needs
    except Exception:
        return False
    return True
