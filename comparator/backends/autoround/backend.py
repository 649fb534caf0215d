"""AutoRound: weights rounded by signed gradient descent, packed as GPTQ or AWQ packs them. Ready-made checkpoints.

The layers are loaded by the backend of the layout, from a folder of links with that method's config.
"""

from __future__ import annotations

from typing import Any

from comparator.backends import dtypes
from comparator.backends import ready_made as sources
from comparator.backends.autoround import layout
from comparator.backends.awq import Awq
from comparator.backends.awq import ready_made as awq
from comparator.backends.base import LoadedModel, Method, Option, Placement, Progress, QuantizedType
from comparator.backends.gptq import Gptq
from comparator.backends.gptq import ready_made as gptq
from comparator.backends.gptqmodel_layers.backend import PackedLayers
from comparator.backends.gptqmodel_layers.kernels import Kernels
from comparator.backends.gptqmodel_layers.links import laid_out
from comparator.core.variant import Variant, sort_options
from comparator.sources import Checkpoint

_BITS = ("2", "3", "4", "8")
_KERNELS = Kernels("AutoRound", tuple(k for k in Gptq.kernels.kernels if k.name in Awq.kernels.names))
_OPTIONS = (
    Option("bits", "bits per weight", "4", choices=_BITS, form="{value}bit"),
    Option("group", "weights that share a scale and a zero point; -1: a whole row. It comes from the checkpoint", None,
           choices=("-1", "16", "32", "64", "128"), form="g{value}"),
    Option("sym", "levels lie symmetrically around zero", "true", choices=("true", "false")),
    Option("kernel", "what multiplies the packed weights. auto: the fastest that is ready, without compiling",
           "auto", choices=("auto", *_KERNELS.names)),
    Option("dtype", "dtype of the activations and of what stays unquantized", "fp16", choices=("fp16", "bf16")),
)  # fmt: skip


class AutoRound(PackedLayers):
    name = "autoround"
    title = "AutoRound"
    kernels = _KERNELS
    decided = ("bits", "group", "sym")
    types = tuple(QuantizedType(f"int{bits} (AutoRound)", int(bits)) for bits in _BITS)
    reads = ("auto-round", "intel/auto-round")
    methods = (
        Method("autoround", "learned rounding", "2 to 8 bits per weight; whether each is rounded up or down was learned. "
               "Loads ready-made checkpoints: autoround@user/repo.",
               _OPTIONS, takes_source=True, needs_source=True, precision=38, bits=4),
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self._layouts: dict[str, PackedLayers] = {"gptq": Gptq(), "awq": Awq()}

    def settings(self, checkpoint: Checkpoint, variant: Variant) -> dict[str, str | None]:
        found = layout.read(checkpoint)
        ready = gptq.read(found.checkpoint) if found.method == "gptq" else awq.read(found.checkpoint)
        return {"bits": str(ready.bits), "group": str(ready.group_size), "sym": str(ready.sym).lower()}

    # ------------------------------------------------------------ loading

    def needed_bytes(self, variant: Variant, checkpoint: Checkpoint) -> int:
        return sum(t.bytes for t in layout.read(self.opened(variant)).checkpoint.tensors)

    def prepare(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> None:
        backend, inner = self._by_layout(variant)
        backend.prepare(checkpoint, inner, placement, progress)

    def load(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> LoadedModel:
        backend, inner = self._by_layout(variant)
        loaded = backend.load(checkpoint, inner, placement, progress)
        opened = self.opened(variant)
        notes = sources.tokenizer_note(opened, checkpoint)
        notes.append(
            f"Packed as {backend.title} packs weights, and loaded as such, without the auto-round package."
        )
        return LoadedModel(loaded.model, loaded.kernel, notes)

    def _by_layout(self, variant: Variant) -> tuple[PackedLayers, Variant]:
        """The backend of the layout, and the variant of it that loads the folder of links."""
        from comparator.core.settings import get_settings

        found = layout.read(self.opened(variant))
        folder = laid_out(
            self.opened(variant),
            found.checkpoint.quantization,
            get_settings().cache_dir,
            self.name,
            found.added(),
        )
        options = {n: v for n, v in self.requested(variant).items() if n in ("kernel", "dtype")}
        backend = self._layouts[found.method]
        return backend, backend.canonical(Variant(found.method, str(folder), None, sort_options(options)))

    # ------------------------------------------------------------ what is stored

    def is_quantized(self, module: Any) -> bool:
        return any(backend.is_quantized(module) for backend in self._layouts.values())

    def dequantize(self, module: Any) -> Any | None:
        found = (backend.dequantize(module) for backend in self._layouts.values())
        return next((weight for weight in found if weight is not None), None)

    # ------------------------------------------------------------ code

    def code(self, variant: Variant, placement: Placement, *, layers: Any = (), kernel: str | None = None):
        """A copy of the checkpoint that transformers takes: with the layout's config, and beside GPTQ's layers g_idx."""
        values, known = self.values(variant), self._opened.get((variant.source, variant.revision))
        found = layout.read(known) if known is not None else None
        is_awq = found.method == "awq" if found else Awq.kernels.ran(kernel) is not None
        table = (Awq if is_awq else Gptq).kernels
        ran = table.ran(kernel) or (table[values["kernel"]] if values["kernel"] != "auto" else None)
        name, backend = "AwqConfig" if is_awq else "GPTQConfig", ran.backend if ran else "auto"
        bits, size = int(values["bits"]), int(values["group"] or 128)
        setup = [
            f"folder = {variant.source!r}",
            "if not Path(folder).is_dir():",
            f"    folder = snapshot_download(folder, revision={variant.revision!r})",
            "# transformers wants the auto-round package for this checkpoint; a copy with the layout's own config loads without.",
            "config = AutoConfig.from_pretrained(folder)",
            f"config.quantization_config = {found.checkpoint.quantization if found else {}!r}",
            "weights = {}",
            'for file in Path(folder).glob("*.safetensors"):',
            "    weights |= load_file(file)",
        ]
        if not is_awq:
            setup += [
                'for name in [n.removesuffix(".qweight") for n in weights if n.endswith(".qweight")]:',
                f'    inputs = weights[f"{{name}}.qweight"].shape[0] * 32 // {bits}',
                f'    weights.setdefault(f"{{name}}.g_idx", (torch.arange(inputs) // {size if size > 0 else "inputs"}).int())',
            ]
        setup += [
            "copy = tempfile.mkdtemp()",
            "config.save_pretrained(copy)",
            'save_file(weights, f"{copy}/model.safetensors", {"format": "pt"})',
            f"quantization = {name}({'' if is_awq else f'bits={bits}, '}backend={backend!r})",
        ]
        imports = [
            "import tempfile",
            "from pathlib import Path",
            "from huggingface_hub import snapshot_download",
            "from safetensors.torch import load_file, save_file",
            f"from transformers import AutoConfig, {name}",
        ]
        arguments = [
            f"dtype={dtypes.torch_name(values['dtype'])}",
            "quantization_config=quantization",
        ]
        return imports, setup, arguments

    def code_weights(self, variant: Variant) -> str | None:
        return "copy"
