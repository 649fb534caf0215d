"""AutoRound on the spot: what decides the weights, and the process in which the auto-round package makes them.

It has a process of its own because importing auto-round patches transformers, which would change other columns; and it
seeds and prints.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from comparator.backends.gptqmodel_layers import shapes
from comparator.backends.gptqmodel_layers.on_the_spot import Progress, dtype_for
from comparator.backends.sizes import TensorSize
from comparator.core.errors import UserError
from comparator.sources import Checkpoint
from comparator.util import atomic_dir, processes

ADVICE = "Try awq or gptq, which need no package of their own, or name a ready-made checkpoint: autoround@user/repo."


def layout_for(bits: int, sym: bool) -> str:
    """The method whose layout auto-round packs into, where it is left the choice."""
    return "awq" if bits == 4 and not sym else "gptq"


@dataclass(frozen=True)
class Recipe:
    """`iters`: steps of signed gradient descent for each layer of the model; 0 rounds to the nearest."""

    bits: int = 4
    group_size: int = 128  # -1: one group a row
    sym: bool = True
    iters: int = 200
    method: ClassVar[str] = "autoround"
    library: ClassVar[str] = "auto-round"

    @property
    def layout(self) -> str:
        """The method whose layout auto-round packs into, where it is left the choice."""
        return layout_for(self.bits, self.sym)

    def sizes(self, checkpoint: Checkpoint) -> list[TensorSize]:
        return list(shapes.packed_sizes(checkpoint, self.bits, self.group_size, g_idx=self.layout == "gptq"))

    def make(
        self,
        checkpoint: Checkpoint,
        samples: list[list[int]],
        tokenizer: Any,
        device: str,
        target: Path,
        progress: Progress,
    ) -> None:
        """See `on_the_spot.Recipe`. Raises `UserError` where auto-round fails."""
        request = {
            "model": str(checkpoint.path.resolve()), "dtype": dtype_for(checkpoint), "samples": samples, "device": device,
            "target": str(target.resolve()), **asdict(self),
        }  # fmt: skip
        environment = processes.offline_environment(AR_LOG_LEVEL="ERROR", TOKENIZERS_PARALLELISM="false")
        with tempfile.TemporaryDirectory() as folder:  # it may write into the working folder
            ended = processes.run_reporting(
                "comparator.backends.autoround.worker", request, environment, progress, Path(folder)
            )
        if ended.code:
            raise _failure(checkpoint, target, ended)


def _failure(checkpoint: Checkpoint, target: Path, ended: processes.Ended) -> UserError:
    said = ended.problem or {}
    if number := said.get("errno"):
        full = atomic_dir.disk_problem(OSError(number, said["problem"]), target, "the quantized checkpoint")
        if full:
            return full
    if ended.code < 0:
        return UserError(
            f"Quantizing {checkpoint.source} was ended by the system (signal {-ended.code}).",
            "The most likely cause is a lack of memory: unload variants or close other programs.",
        )
    because = said.get("problem") or ended.last_error
    return UserError(
        f"auto-round cannot quantize {checkpoint.source}: {because}", said.get("advice") or ADVICE
    )
