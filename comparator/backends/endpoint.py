"""A server with OpenAI's API as a column: vLLM, llama-server, Ollama, SGLang, TGI, LM Studio, `transformers serve`.

What it computes with is its own affair; runtimes/endpoint asks it and measures.
"""

from __future__ import annotations

from comparator.backends.base import AdapterKind, Backend, Method, Progress
from comparator.core.endpoints import NAME, find_endpoint, is_address, parse_address, parse_endpoints
from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.core.variant import Variant
from comparator.sources import Checkpoint


class EndpointBackend(Backend):
    name = "endpoint"
    runtime = "endpoint"
    requires = ("openai",)
    install = "-r requirements-endpoint.txt"
    source_kind = "endpoint"
    methods = (
        Method("endpoint", "Server", "The answer of any server with OpenAI's API (vLLM, llama-server, Ollama …): endpoint@NAME "
               "with a name from COMPARATOR_ENDPOINTS, or endpoint@http://host:8000/v1. Latency is measured from here.",
               takes_source=True, needs_source=True, precision=1, bits=16),
    )  # fmt: skip

    def here(self) -> list[str]:
        names = ", ".join(parse_endpoints(get_settings().endpoints))
        return [f"Names here: {names}." if names else "COMPARATOR_ENDPOINTS lists none here."]

    def offers(self, model: str) -> list[str]:
        return [f"{self.name}@{name}" for name in parse_endpoints(get_settings().endpoints)]

    def describe(self, variant: Variant) -> str:
        return f"Server {variant.source}" if variant.source else "Server"

    def check(self, variant: Variant, values: dict[str, str]) -> None:
        source = variant.source
        if not source:
            return
        if is_address(source):
            parse_address(source)
        elif not NAME.fullmatch(source) or variant.revision:
            raise UserError(
                f"“{source[:60]}” is neither a name nor an address of a server.",
                "Write endpoint@NAME with a name from COMPARATOR_ENDPOINTS, or endpoint@http://host:8000/v1.",
            )

    def complete(self, variant: Variant, checkpoint: Checkpoint, progress: Progress | None = None) -> Variant:
        if not variant.source:
            raise UserError(
                "endpoint needs a server after an @.", "Write endpoint@NAME or endpoint@http://host:8000/v1."
            )
        find_endpoint(variant.source, get_settings().endpoints)
        return variant

    def save(self, checkpoint, variant, placement, target, progress, change=None):
        raise UserError(
            f"{variant.notation} cannot be exported: its weights are on the server.",
            "Export them there, or another variant here.",
        )

    def tensor_sizes(self, variant: Variant, checkpoint: Checkpoint, device: str = ""):
        return ()  # nothing is held on this machine

    def check_adapter(self, variant: Variant, adapter: AdapterKind) -> None:
        raise UserError(
            f"{variant.notation} takes no adapter: the server loads its own.",
            "Let the server serve the model with the adapter, and name it after a # in COMPARATOR_ENDPOINTS.",
        )
