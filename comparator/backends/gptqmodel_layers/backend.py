"""Base of the backends whose quantized layers are gptqmodel's: what is stored in them, decoding, adapters, training.

A subclass names the method as gptqmodel and as people call it, its kernels, and how a weight is unpacked.
"""

from __future__ import annotations

from typing import Any, ClassVar

from comparator.backends import dtypes, saving
from comparator.backends.base import AdapterKind, LoadedModel, Logical, Placement, Training
from comparator.backends.gptqmodel_layers.kernels import Kernel, Kernels, Packed
from comparator.backends.ready_made import FromCheckpoint
from comparator.backends.sizes import TensorSize, as_stored
from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.core.variant import Variant
from comparator.sources import Checkpoint
from comparator.util.compat import gptqmodel

STATE = ("qzeros", "scales", "g_idx", "scales_and_zeros", "ret_idx")


class PackedLayers(FromCheckpoint):
    requires = ("torch", "transformers", "gptqmodel", "optimum")
    libraries = ("gptqmodel",)
    loaded_by = ("transformers", "vLLM")
    weight_name = "qweight"
    title: ClassVar[str]
    """The method in sentences, and in the names of its dtypes: `int4 (TITLE)`."""
    method_name: ClassVar[str]
    """What gptqmodel calls it: a layer's class lists the methods it multiplies."""
    kernels: ClassVar[Kernels]

    def is_quantized(self, module: Any) -> bool:
        kind = type(module)
        if not kind.__module__.startswith("gptqmodel.nn_modules.qlinear") or not hasattr(module, "bits"):
            return False
        return self.method_name in (getattr(m, "value", m) for m in getattr(kind, "SUPPORTS_METHODS", ()))

    def owns(self, module: Any) -> bool:
        return self.is_quantized(module)

    def bits(self, variant: Variant) -> float:
        return int(self.values(variant).get("bits") or self.method(variant.method).bits)

    # ------------------------------------------------------------ loading

    def here(self) -> list[str]:
        return self.kernels.possible()

    def silence(self) -> None:
        from comparator.backends.gptqmodel_layers import quiet

        quiet.silence()

    def kernel_that_ran(self, variant: Variant, name: str | None) -> Kernel | None:
        """For the code to copy: the kernel that the column names, else the one that the variant asks for, if any."""
        requested = self.values(variant)["kernel"]
        return self.kernels.ran(name) or (None if requested == "auto" else self.kernels[requested])

    def kernel(self, variant: Variant, packed: Packed, placement: Placement) -> Kernel:
        """The kernel that the variant is loaded with. Raises `UserError` where it cannot run."""
        if placement.device.startswith("cuda"):
            gptqmodel.launch_on_stream(
                get_settings().cache_dir
            )  # before it is asked what is compiled already
            gptqmodel.unpacking_scratch_only()
        spread = bool(placement.max_memory and "cpu" in placement.max_memory)
        spread = spread and placement.device.startswith("cuda")
        return self.kernels.choose(self.values(variant)["kernel"], packed, placement.device, spread)

    def recipe(self, variant: Variant) -> Any:
        """Of a completed variant that is made on the spot; its `sizes` are those of the checkpoint."""
        raise NotImplementedError

    def packed(self, variant: Variant, checkpoint: Checkpoint) -> Packed:
        """What the kernel has to cope with."""
        raise NotImplementedError

    def stored_sizes(self, variant: Variant, checkpoint: Checkpoint) -> list[TensorSize]:
        """The tensors of the quantized checkpoint, ready-made or as it is made here."""
        if variant.source:
            return as_stored(self.opened(variant))
        return self.recipe(self.complete(variant, checkpoint)).sizes(checkpoint)

    def tensor_sizes(self, variant: Variant, checkpoint: Checkpoint, device: str = "") -> list[TensorSize]:
        stored = self.stored_sizes(variant, checkpoint)
        if device != "cpu":  # CUDA's kernels hold what is stored
            return stored
        try:
            repack = self.kernel(variant, self.packed(variant, checkpoint), Placement(device)).repack
        except UserError:  # said when it is loaded
            return stored
        return [repack(size) for size in stored] if repack else stored

    def workspace_bytes(self, variant, rows, outputs, inputs, device) -> int:
        return 2 * outputs * inputs  # the layer's weight, unpacked for many rows

    def save_on_the_spot(
        self, checkpoint, variant: Variant, placement: Placement, target, progress, change=None
    ):
        """What was quantized here is a checkpoint already."""
        saving.copy_checkpoint(self.make(checkpoint, variant, placement.device, progress), target, progress)

    def loaded(self, model: Any, variant: Variant, notes: list[str]) -> LoadedModel:
        """The model with the kernel that it really got. Raises `UserError` where nothing in it is quantized."""
        layers = [m for m in model.modules() if self.is_quantized(m)]
        if not layers:
            raise UserError(
                f"transformers loaded {variant.notation} without a {self.title} layer.",
                "The checkpoint's layer names do not match this architecture: use another one.",
            )
        for module in layers:
            # gptqmodel wraps this method in torch.compile, which would compile at the first forward; the class's own.
            vars(module).pop("dequantize_weight", None)
        names = sorted({type(module).__name__ for module in layers})
        return LoadedModel(model, f"gptqmodel {' + '.join(names)}", notes)

    # ------------------------------------------------------------ what is stored

    def quant_state(self, module: Any) -> dict[str, Any]:
        """Scales, zeros and g_idx; and, once a CPU kernel has rearranged them, what it multiplies with instead."""
        if not self.is_quantized(module):
            return {}
        state: dict[str, Any] = {}
        for name in STATE:
            tensor = getattr(module, name, None)
            if tensor is not None and hasattr(tensor, "untyped_storage"):
                state[name] = tensor
        return state

    def logical(self, module: Any, parameter: Any) -> Logical | None:
        if not self.is_quantized(module) or not _same(parameter, getattr(module, "qweight", None)):
            return None
        scales = getattr(module, "scales", None)
        compute = dtypes.short_name(scales.dtype) if scales is not None else "fp16"
        if type(module).__name__.startswith("TorchAten"):
            compute = "bf16"
        return Logical(f"int{module.bits} ({self.title})", (module.out_features, module.in_features), compute)

    # ------------------------------------------------------------ decoding

    def on_parallel_streams(self, module: Any) -> bool:
        """gptqmodel's torch kernels unpack the weights and multiply with cuBLAS, which would take a workspace for each
        stream and fills the card by itself."""
        return hasattr(module, "qweight") and "Torch" not in type(module).__name__

    def opaque(self, module: Any) -> bool:
        """ExLlamaV2's kernel writes into a buffer without declaring it; torch.compile takes the call for one without
        effect and drops it: 753 tok/s on an H100 whose memory bandwidth allows 641."""
        return hasattr(module, "out_features") and hasattr(module, "qweight")

    def deterministic(self, module: Any) -> bool:
        """ExLlamaV2 adds with atomic operations in fp16, in whatever order its blocks finish."""
        return "ExllamaV2" not in type(module).__name__

    def graph_refusal(self, module: Any) -> str | None:
        if "ExllamaV2" in type(module).__name__ and not gptqmodel.follows_stream():
            return "ExLlamaV2 launches its kernels on CUDA's default stream, which a graph does not see"
        return None

    # ------------------------------------------------------------ adapters and training

    def check_adapter(self, variant: Variant, adapter: AdapterKind) -> None:
        if adapter.merged:
            raise UserError(
                f"{self.title} weights cannot take a merge: they are fixed codes of {self.values(variant)['bits'] or 4} "
                "bits, and changing one means quantizing the layer again with calibration data.",
                f"Leave :merged out ({adapter.source} works unmerged on {self.title}), or merge on bf16 and quantize that.",
            )
        if adapter.peft_type in ("LOHA", "LOKR", "IA3"):
            raise UserError(
                f"{adapter.source} is {adapter.kind}, and peft has no {adapter.kind} for {self.title} layers: it would "
                "take the packed bytes for the weights.",
                "Use bf16 or int8 for this adapter, or a LoRA, which every variant takes.",
            )
        if adapter.dora:
            raise UserError(
                f"{adapter.source} is {adapter.kind}, and peft has no DoRA for {self.title} layers: DoRA needs the norm "
                "of the unpacked weight.",
                "Use another variant for this adapter (nf4 has the same size), or a LoRA without DoRA.",
            )

    def training(self, variant: Variant, device: str) -> Training:
        return Training(dtype=self.values(variant)["dtype"])

    def training_variants(self, variant: Variant, device: str) -> list[tuple[Variant, tuple[str, ...]]]:
        kernel, usable = self.values(variant)["kernel"], self.kernels.trainable(device)
        if kernel in self.kernels.trainable(device, compiling=True):
            return [(variant, ())]
        choices, notes = [], ()
        for number, name in enumerate(usable):
            if number:
                notes = (*notes, f"Trained with the kernel {name}: {usable[0]} cannot be used here.")
            elif kernel not in ("auto", name):
                notes = (f"Trained with the kernel {name}: {kernel} has no gradients.",)
            choices.append((self.with_options(variant, {"kernel": name}), notes))
        return choices


def _same(tensor: Any, own: Any) -> bool:
    """Whether a stored tensor is the module's own; with an offloaded module that holds a placeholder only."""
    if own is None or tensor is own:
        return tensor is own
    return own.device.type == "meta" and (tensor.shape, tensor.dtype) == (own.shape, own.dtype)
