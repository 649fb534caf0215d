"""The contract of a runtime: what executes a column.

To add one: write `runtimes/yourname.py` with a subclass of `Runtime` and one of `ResidentModel`, and name it in the
backend whose methods it executes (`runtime = "yourname"`). Nothing else has to be touched. `Runtime.load` and
`ResidentModel.generate` have to be written, and `answer_logits` and `window_logits`, or `answer_choices` by a runtime
without full logits. Everything else has a default for a runtime that does not offer it: the figure is then "–", and the
column's notes give the reason that `Runtime.absent` holds.

Logits are torch tensors or numpy arrays. All methods are called on the engine's thread. Importing a runtime must be
cheap: its libraries are imported inside the methods.
"""

from __future__ import annotations

import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from comparator.backends.base import Placement, Progress
from comparator.core.errors import UserError
from comparator.core.messages import Generation, Loaded, Prompt
from comparator.core.request import GenerationSettings
from comparator.core.result import LayerRow, Memory, ModelInfo
from comparator.core.state import Resident
from comparator.core.variant import Adapter, Variant

if TYPE_CHECKING:
    from comparator.adapters import Plan
    from comparator.decoding.timed_batch import TimedBatch
    from comparator.sources import Checkpoint

OnToken = Callable[[tuple[int, float]], None]  # (token id, `time.perf_counter()` when it reached the host)
# Measured without being asked for, so a column's notes say why they are missing.
NOTED = ("memory", "layers", "full logits", "weight errors", "noise floor")


class Runtime(ABC):
    """Subclass this. One instance loads all models; it must hold none."""

    name: ClassVar[str]
    absent: ClassVar[Mapping[str, str]] = {
        "adapters": "it loads no adapters",
        "max_memory": "it keeps a model on one device",
        "weight errors": "it gives no access to the weights",
        "noise floor": "it computes a window of text in one pass only",
        "sensitivity": "its layers cannot be replaced one by one",
    }
    """What this runtime does not offer, each with the reason as a clause. A subclass leaves out what it offers."""

    @abstractmethod
    def load(
        self,
        checkpoint: Checkpoint,
        variant: Variant,
        placement: Placement,
        progress: Progress,
        residents: Sequence[ResidentModel] = (),
        plan: Plan | None = None,
    ) -> ResidentModel:
        """Make a variant resident, warmed up and measured.

        residents: what is resident already, whose weights may be shared. plan: an adapter that needs a base of its own.
        `progress` may raise `Stopped`. Raises `UserError` for everything that a person can mend.
        """

    def require(self, capability: str, variant: Variant) -> None:
        """Raises `UserError` for what is listed in `absent`."""
        if reason := self.absent.get(capability):
            raise UserError(
                f"Not available for {variant.notation}: {capability}. It is executed by {self.name}: {reason}.",
                "Choose another variant for this.",
            )

    @property
    def notes(self) -> list[str]:
        """For every column of this runtime: which figures are missing, and why."""
        missing = [f"{name} ({self.absent[name]})" for name in NOTED if name in self.absent]
        return [f"Not available from {self.name}: {', '.join(missing)}."] if missing else []


@dataclass(frozen=True)
class Choices:
    """What a column without full logits says of one position.

    Attributes:
        first: the token that it puts first.
        log_p: log-probabilities in nats by token id, of as many tokens as it names; empty where it names none.
    """

    first: int
    log_p: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RequestTimes:
    """One streamed answer of a server, as the client saw it.

    Attributes:
        start_s: `time.perf_counter()` when the request was sent. times_s: when each piece arrived.
        tokens: of the answer. prompt_tokens: as the server counted them; None: it does not say.
        error: why there is no whole answer.
    """

    start_s: float
    times_s: tuple[float, ...] = ()
    tokens: int = 0
    prompt_tokens: int | None = None
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.times_s[0] - self.start_s

    @property
    def mean_gap_s(self) -> float:
        """Mean time between two tokens."""
        return (self.times_s[-1] - self.times_s[0]) / max(1, self.tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Times between two pieces, each divided by how many tokens a piece has in the mean."""
        each = max(1.0, self.tokens / len(self.times_s))
        return [(b - a) / each for a, b in zip(self.times_s, self.times_s[1:], strict=False)]


class ServerLoad(ABC):
    """Requests to a server that schedules them itself; a context manager, which ends what is still running."""

    @abstractmethod
    def open(self, at_once: int) -> None:
        """Make so many connections."""

    @abstractmethod
    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[RequestTimes]:
        """Answer all prompts, as many at once as there are connections. Raises `Stopped`."""

    def __enter__(self) -> ServerLoad:
        return self

    @abstractmethod
    def __exit__(self, *_: Any) -> None: ...


class Weights(ABC):
    """The tensors of one model, module by module, for weight errors."""

    weight_name: str = "weight"  # of the tensor that holds a packed weight

    @abstractmethod
    def modules(self) -> Sequence[str]:
        """Names of the modules that hold tensors of their own."""

    @abstractmethod
    def tensors(self, module: str) -> Mapping[str, Any]:
        """The module's own tensors as they are stored, by name; empty where there is no such module."""

    @abstractmethod
    def unpacked(self, module: str) -> Any | None:
        """The module's weight (out, in) in float32 where it is quantized; else None."""


@dataclass(kw_only=True, eq=False)
class ResidentModel(ABC):
    """One resident variant. Dropping the last reference to it frees its memory, after `unload`.

    Attributes:
        vocabulary: width of the logits.
        logit_bytes: bytes per value of `window_logits`.
        load_s, prepare_s: seconds that loading took, and warming up after it; None: not measured.
        rows: one per stored tensor, as stored after the first use; empty where the runtime does not report them.
        storages: bytes by storage, where several resident models may hold the same one.
        spread: over several devices.
        private: an adapter that was written into these weights: no other column may use them.
    """

    runtime: Runtime
    checkpoint: Checkpoint
    variant: Variant
    device: str
    kernel: str
    vocabulary: int
    logit_bytes: int = 4
    memory: Memory = field(default_factory=Memory)
    load_s: float | None = None
    prepare_s: float | None = None
    rows: list[LayerRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    storages: dict[tuple, int] = field(default_factory=dict)
    spread: bool = False
    private: Plan | None = None
    # The pool's and the tasks' own:
    handle: str = field(default_factory=lambda: secrets.token_hex(8))
    key: tuple = ()  # what was asked for
    last_used: float = field(default_factory=time.monotonic)
    weight_errors: dict[str, dict] = field(default_factory=dict)  # by the reference's handle

    # ------------------------------------------------------------ to be written

    @abstractmethod
    def generate(
        self,
        prompt: Prompt,
        settings: GenerationSettings,
        cancel: threading.Event,
        emit: OnToken,
        adapter: Adapter | None = None,
    ) -> Generation:
        """Decode and measure; `emit` gets each token as it comes. Ends at an end-of-sequence token (emitted too), at
        `max_new_tokens`, or soon after `cancel` is set (`finish_reason` "stopped"). `metrics.latency.from_timestamps`
        makes the figures. Raises `UserError` for settings that it cannot honour."""

    def answer_logits(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], cancel: threading.Event
    ) -> Generator[Any]:
        """The float32 logits (vocabulary,) before each of `token_ids`, computed by the steps that `generate` takes,
        with these tokens in place of the chosen ones. Raises `Stopped`."""
        self.runtime.require("full logits", self.variant)
        raise NotImplementedError

    def window_logits(self, token_ids: Sequence[int], skip: int, cancel: threading.Event) -> Any:
        """The logits (len(token_ids) - skip, vocabulary) after each token but the first `skip`, in one pass. Raises
        `Stopped`."""
        self.runtime.require("full logits", self.variant)
        raise NotImplementedError

    def answer_choices(
        self, prompt: Prompt, token_ids: Sequence[int], cancel: threading.Event
    ) -> Generator[Choices]:
        """Where "full logits" is absent, in place of `answer_logits`: an entry for each of `token_ids`, fewer where the
        column cannot be made to follow them and says something else. Raises `Stopped`, `UserError`."""
        raise NotImplementedError

    # ------------------------------------------------------------ with a default

    def answer_many(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        cancel: threading.Event,
        on_logits: Callable[[int, Any], None],
        forced: Sequence[Sequence[int]] | None = None,
    ) -> list[Any] | None:
        """Several prompts decoded at once, or `forced` answers fed: an entry with `token_ids`, `finish_reason`, `near_tie` for
        each; `on_logits(row, logits)` before each token. Called inside `using`. None: one at a time only. Raises `Stopped`."""
        return None

    def timed_batch(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, cancel: threading.Event
    ) -> TimedBatch:
        """What prefills and decodes these prompts of one length at once, to be timed; no token ends them. Called inside
        `using`. Raises `UserError` where this runtime decodes one sequence at a time."""
        raise UserError(
            f"{self.variant.notation} is executed by {self.runtime.name}, which decodes one sequence at a time here.",
            "Choose a variant that transformers executes.",
        )

    def server_load(self, cancel: threading.Event) -> ServerLoad | None:
        """For a runtime that has a server decode: requests to be timed. None: it decodes batches, see `timed_batch`."""
        return None

    def unload(self) -> None:  # noqa: B027 - nothing to do by default
        """Free what outlives this object: a process, a connection."""

    def is_current(self) -> bool:
        """Whether it is still what was loaded; asked before it is used again. False: it is unloaded and loaded again."""
        return True

    def use(self) -> None:  # noqa: B027 - nothing to do by default
        """Called before each piece of work on this model."""

    def chunked_logits(
        self, token_ids: Sequence[int], skip: int, chunk: int, cancel: threading.Event
    ) -> Iterator[tuple[slice, Any]] | None:
        """The same logits as `window_logits`, `chunk` tokens at a time through the key-value cache: (its rows, their
        logits). None: absent ("noise floor")."""
        return None

    def weights(self) -> Weights | None:
        """None: absent ("weight errors")."""
        return None

    def replaceable(self, donor: ResidentModel) -> list[str]:
        """Names of the layers that `donor` stores in another way. Called unless "sensitivity" is absent."""
        raise NotImplementedError

    def with_layers_of(self, donor: ResidentModel, names: Iterable[str]) -> AbstractContextManager[Any]:
        """Inside, the named layers are the donor's. Called unless "sensitivity" is absent."""
        raise NotImplementedError

    def has(self, adapter: Adapter | None) -> bool:
        """Whether `using(adapter)` needs no `attach` before it."""
        return adapter is None or adapter.merged

    def attach(self, plan: Plan) -> float | None:
        """Prepare an adapter for `using`. Returns the seconds that this took, None where it was there. Called unless
        "adapters" is absent."""
        raise NotImplementedError

    def using(self, adapter: Adapter | None) -> AbstractContextManager[Any]:
        """Inside, the model has the adapter, or none. `generate` does this itself. Not to be nested."""
        return nullcontext()

    def layers(self, adapter: Adapter | None = None) -> tuple[LayerRow, ...]:
        return tuple(self.rows)

    @property
    def held_bytes(self) -> int:
        """Its memory now, adapters included."""
        return self.memory.resident_bytes or 0

    def describe(self, fresh: bool, plan: Plan | None = None) -> Loaded:
        """What loading gave. fresh: whether it happened now; plan: of the column's adapter."""
        known = self.checkpoint
        loaded = Loaded(
            handle=self.handle,
            variant=self.variant,
            model=ModelInfo(known.source, known.revision, known.architecture, known.parameters),
            kernel=self.kernel,
            notes=(*self.notes, *self.runtime.notes, *([known.note] if known.note else [])),
            memory=self.memory,
            load_s=self.load_s if fresh else None,
            prepare_s=self.prepare_s if fresh else None,
        )
        if plan is None:
            return loaded
        return replace(loaded, notes=(*loaded.notes, *plan.notes), adapter=plan.facts.info())

    def resident(self, shared_bytes: int = 0) -> Resident:
        own = f" + {self.private.adapter.notation}" if self.private else ""
        return Resident(
            self.handle,
            self.checkpoint.source,
            self.variant.notation + own,
            self.held_bytes,
            self.device,
            shared_bytes,
        )
