"""`compare`: the only endpoint for programs, over gradio_client, plain HTTP and MCP; see docs/api.md.

It has the same limits, queue and store as the page.
"""

from __future__ import annotations

import asyncio
import threading
import time
import typing
from typing import Any, Literal

import gradio as gr

from comparator.api import request as build_request
from comparator.core.errors import UserError
from comparator.core.events import Done, Event
from comparator.core.request import Request
from comparator.core.result import Comparison
from comparator.ui.admission import Admission, link
from comparator.ui.listeners import LISTENERS
from comparator.ui.page import Page


def build(page: Page) -> None:
    """Must be called inside the page's Blocks."""
    gr.api(endpoint(page.admission), api_name="compare", concurrency_limit=None)


def endpoint(admission: Admission):
    """The function that clients call; they see its docstring and its types."""

    async def compare(
        prompt: str,
        variants: list[str] = ["bf16", "nf4"],  # noqa: B006 - shown to clients, never changed
        model: str = "",
        adapters: list[str] = [],  # noqa: B006
        system: str = "",
        chat: bool | None = None,
        template_vars: list[str] = [],  # noqa: B006
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        repeats: int = 0,
        fidelity: Literal["none", "prompt", "text"] = "prompt",
        layers: bool = False,
        request: gr.Request = None,
    ) -> dict[str, Any]:
        """Run quantized variants of one language model on one prompt, one after another, and measure each of them.

        Args:
            prompt: The prompt to answer.
            variants: Notations such as bf16, int8, nf4, nf4:dq, fp4, gptq:4bit,g64; one column each.
            model: A built-in name or user/name on the Hub; empty: the server's default.
            adapters: LoRA adapters, user/name or built in; every variant also runs with each of them.
            system: A system prompt; empty: none.
            chat: Whether to use the model's chat template; null: if the model has one.
            template_vars: Variables of the chat template, each NAME=VALUE, such as enable_thinking=false.
            max_new_tokens: Maximum length of the answer, in tokens.
            temperature: 0 is greedy.
            top_p: Nucleus sampling: keep the most likely tokens up to this total probability; 1 is off.
            top_k: Keep this many of the most likely tokens; 0 is off.
            repetition_penalty: 1 is off.
            seed: The same seed gives the same tokens on the same machine.
            repeats: Runs per column, interleaved; the median is reported. 0: 3 where a round takes under 10 s, else 1.
            fidelity: What fidelity is measured on: prompt (the reference's answer), text (an evaluation text as well) or none.
            layers: Whether to include one entry per stored tensor of each column.

        Returns:
            id and url of the saved comparison (null if it could not be saved), and comparison, the comparison
            document: prompt, settings, environment, reference, and cells with text, latency, memory and fidelity.
        """
        try:
            comparison_request = build_request(
                prompt, variants, model or None, adapters, system=system or None, chat=chat, template_vars=template_vars,
                fidelity=fidelity,
                max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                repetition_penalty=repetition_penalty, seed=seed, repeats=repeats,
            )  # fmt: skip
            admission.admit(comparison_request, request)
            comparison = await _followed(admission, comparison_request, request)
        except UserError as problem:
            raise gr.Error(str(problem), print_exception=False) from None
        saved = admission.holds(comparison.id)
        return {
            "id": comparison.id if saved else None,
            "url": link(request, comparison.id) if saved else None,
            "comparison": as_data(comparison, layers),
        }

    compare.__annotations__ = typing.get_type_hints(compare)  # Gradio reads the return type as it stands
    return compare


async def _followed(admission: Admission, request: Request, asker: gr.Request | None) -> Comparison:
    """Run it, and stop it as soon as nobody waits for the answer any more."""
    stop, since_s = threading.Event(), time.monotonic()
    running = asyncio.ensure_future(asyncio.to_thread(_run, admission, request, asker, stop))
    try:
        while not (await asyncio.wait([running], timeout=0.5))[0]:
            if await _hung_up(asker, since_s):
                stop.set()
        return await running
    finally:
        stop.set()


async def _hung_up(asker: gr.Request | None, since_s: float) -> bool:
    request, session = getattr(asker, "request", None), getattr(asker, "session_hash", None)
    if request is not None and not session:  # the answer comes on the connection of the call itself
        return await request.is_disconnected()
    return LISTENERS.hung_up(session, since_s)


def _run(
    admission: Admission, request: Request, asker: gr.Request | None, stop: threading.Event
) -> Comparison:
    finished: list[Comparison] = []

    def take(event: Event) -> None:
        if isinstance(event, Done):
            finished.append(event.comparison)

    admission.run(request, None, stop, take, asker)
    if not finished:
        raise UserError("The comparison ended before it was complete.", "Try again.")
    return finished[0]


def as_data(comparison: Comparison, layers: bool) -> dict[str, Any]:
    """The document as plain JSON data; `layers` is by far its longest part and optional."""
    data = comparison.to_dict()
    if not layers:
        for cell in data["cells"]:
            del cell["layers"]
    return data


def mcp_installed() -> bool:
    """Whether Gradio's MCP extra is installed and can be imported."""
    import importlib.util

    if importlib.util.find_spec("mcp") is None:
        return False
    try:
        import gradio.mcp  # noqa: F401 - what `launch(mcp_server=True)` needs
    except Exception:
        return False
    return True
