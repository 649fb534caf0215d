"""AutoRound: weights rounded by signed gradient descent, packed as GPTQ or AWQ packs them; made on the spot by the
auto-round package, or loaded ready-made, without it.

The layers are loaded by the backend of the layout, from a folder of links with that method's config.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comparator.backends import calibration, dtypes
from comparator.backends import ready_made as sources
from comparator.backends.autoround import layout
from comparator.backends.autoround.recipe import Recipe, layout_for
from comparator.backends.awq import Awq
from comparator.backends.awq import ready_made as awq
from comparator.backends.base import LoadedModel, Method, Option, Placement, Progress, QuantizedType
from comparator.backends.gptq import Gptq
from comparator.backends.gptq import ready_made as gptq
from comparator.backends.gptqmodel_layers import on_the_spot, shapes
from comparator.backends.gptqmodel_layers.backend import PackedLayers
from comparator.backends.gptqmodel_layers.kernels import Kernel, Kernels, Packed
from comparator.backends.gptqmodel_layers.links import laid_out
from comparator.backends.sizes import TensorSize, as_stored
from comparator.core.errors import UserError
from comparator.core.variant import Variant, sort_options
from comparator.sources import Checkpoint

_BITS = ("2", "3", "4", "8")
_KERNELS = Kernels("AutoRound", tuple(k for k in Gptq.kernels.kernels if k.name in Awq.kernels.names))
_OPTIONS = (
    Option("bits", "bits per weight", "4", choices=_BITS, form="{value}bit"),
    Option("group", "weights that share a scale and a zero point; -1: a whole row. Default: the largest of 128, 64 and 32 that divides every layer", None, choices=("-1", "16", "32", "64", "128"), form="g{value}"),
    Option("sym", "levels lie symmetrically around zero; sym=false has a zero point of its own for every group", "true",
           choices=("true", "false")),
    Option("iters", "steps of learning for each layer of the model; 0: rounded to the nearest, as a baseline", "200",
           kind="number", minimum=0, maximum=10_000),
    Option("cal", "calibration text: c4 or wikitext2 from the Hub, or the hash of a text of your own, which --calibration FILE stores. Default: the bundled text", None, kind="text"),
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
    making = ("auto_round",)
    install_making = "-r requirements-autoround.txt"
    calibration_option = "cal"
    makes_checkpoints = True
    methods = (
        Method("autoround", "learned rounding", "2 to 8 bits per weight; whether each is rounded up or down is learned on a "
               "calibration text. Quantized here (once, then cached), or ready-made: autoround@user/repo.",
               _OPTIONS, takes_source=True, precision=38, bits=4),
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self._layouts: dict[str, PackedLayers] = {"gptq": Gptq(), "awq": Awq()}

    # ------------------------------------------------------------ options

    def check(self, variant: Variant, values: dict[str, str]) -> None:
        calibration.check_name(values["cal"])
        if not float(values["iters"]).is_integer():
            raise UserError(f"iters={values['iters']} is not a whole number.", "Write iters=200.")
        if not variant.source and values["bits"] == "8" and values["sym"] == "false":
            raise UserError(
                "auto-round cannot write 8-bit weights with sym=false.", "Remove sym=, or use fewer bits."
            )

    def settings(self, checkpoint: Checkpoint, variant: Variant) -> dict[str, str | None]:
        requested = self.requested(variant)
        if name := next((n for n in ("cal", "iters") if n in requested), None):
            raise UserError(
                f"{name}={requested[name]} is requested, but {checkpoint.source} is quantized already.",
                f"{name} applies only when quantizing: remove it, or write autoround without a source.",
            )
        found = layout.read(checkpoint)
        ready = gptq.read(found.checkpoint) if found.method == "gptq" else awq.read(found.checkpoint)
        return {"bits": str(ready.bits), "group": str(ready.group_size), "sym": str(ready.sym).lower()}

    def complete_on_the_spot(
        self, variant: Variant, checkpoint: Checkpoint, progress: Progress | None = None
    ) -> Variant:
        shapes.require_full_precision(checkpoint, self.title, variant.method)
        if checkpoint.model_type == "gpt2" or any(".experts." in t.name for t in checkpoint.tensors):
            raise UserError(
                f"auto-round packs the weights of a {checkpoint.architecture} in a way that transformers does not read: "
                "transposed layers (Conv1D), or each expert separately.",
                "Use nf4 or int8 for this model.",
            )
        wish = self.requested(variant).get("group")
        return self.with_options(
            variant, {"group": str(shapes.group_size(checkpoint, int(wish) if wish else None))}
        )

    def with_calibration(self, variant: Variant, source: Any) -> Variant:
        return variant if variant.source else calibration.applied_to(variant, source)

    def recipe(self, variant: Variant) -> Recipe:
        """Of a completed variant that is made on the spot."""
        values = self.values(variant)
        return Recipe(
            int(values["bits"]), int(values["group"]), values["sym"] == "true", int(float(values["iters"]))
        )

    # ------------------------------------------------------------ loading

    def stored_sizes(self, variant: Variant, checkpoint: Checkpoint) -> list[TensorSize]:
        if not variant.source:
            return super().stored_sizes(variant, checkpoint)
        return as_stored(layout.read(self.opened(variant)).checkpoint)

    def packed(self, variant: Variant, checkpoint: Checkpoint) -> Packed:
        if not variant.source:
            recipe = self.recipe(self.complete(variant, checkpoint))
            sizes = frozenset((layer.inputs, layer.outputs) for layer in shapes.layers(checkpoint))
            return Packed(
                recipe.bits, recipe.group_size, False, recipe.sym, self.values(variant)["dtype"], sizes
            )
        found = layout.read(self.opened(variant))
        ready = gptq.read(found.checkpoint) if found.method == "gptq" else awq.read(found.checkpoint)
        return ready.packed(self.values(variant)["dtype"])

    def kernel(self, variant: Variant, packed: Packed, placement: Placement) -> Kernel:
        name = (
            layout.read(self.opened(variant)).method
            if variant.source
            else layout_for(packed.bits, packed.sym)
        )
        backend = self._layouts[name]
        return backend.kernel(
            backend.canonical(Variant(name, None, None, self._loading(variant))), packed, placement
        )

    def prepare(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> None:
        if not variant.source:
            self.kernel(
                variant, self.packed(variant, checkpoint), placement
            )  # refuses before minutes of work
        backend, inner = self._by_layout(self._stored(checkpoint, variant, placement, progress))
        backend.prepare(checkpoint, inner, placement, progress)

    def make(self, checkpoint: Checkpoint, variant: Variant, device: str, progress: Progress) -> Path:
        from comparator.core.settings import get_settings

        variant = self.complete(variant, checkpoint)
        recipe, cal = self.recipe(variant), self.values(variant)["cal"]
        return on_the_spot.make(checkpoint, recipe, cal, get_settings().cache_dir, device, progress)

    def load(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> LoadedModel:
        stored = self._stored(checkpoint, variant, placement, progress)
        backend, inner = self._by_layout(stored)
        loaded = backend.load(checkpoint, inner, placement, progress)
        notes = sources.tokenizer_note(self.opened(stored), checkpoint)
        notes.append(
            f"Packed as {backend.title} packs weights, and loaded as such, without the auto-round package."
        )
        return LoadedModel(loaded.model, loaded.kernel, notes)

    def _stored(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> Variant:
        """The variant that names its checkpoint: itself, or of what is made here."""
        if variant.source:
            return variant
        path = self.make(checkpoint, variant, placement.device, progress)
        return self.complete(Variant(self.name, str(path), None, self._loading(variant)), checkpoint)

    def _loading(self, variant: Variant) -> tuple[tuple[str, str | None], ...]:
        """The options that say how to load, not how to quantize."""
        return sort_options({n: v for n, v in self.requested(variant).items() if n in ("kernel", "dtype")})

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
        backend = self._layouts[found.method]
        return backend, backend.canonical(Variant(found.method, str(folder), None, self._loading(variant)))

    # ------------------------------------------------------------ what is stored

    def is_quantized(self, module: Any) -> bool:
        return any(backend.is_quantized(module) for backend in self._layouts.values())

    def dequantize(self, module: Any) -> Any | None:
        found = (backend.dequantize(module) for backend in self._layouts.values())
        return next((weight for weight in found if weight is not None), None)

    # ------------------------------------------------------------ code

    def code(self, variant: Variant, placement: Placement, *, layers: Any = (), kernel: str | None = None):
        """A copy of the checkpoint that transformers takes: with the layout's config, and beside GPTQ's layers g_idx."""
        values = self.values(variant)
        if not variant.source:
            # transformers hands the folder to the auto-round package, which is there where it was made.
            return [], [], [f"dtype={dtypes.torch_name(values['dtype'])}"]
        known = self._opened.get((variant.source, variant.revision))
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
            "# transformers wants the auto-round package for this checkpoint; a copy with the layout's own config loads "
            "without it.",
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
        return "copy" if variant.source else repr(on_the_spot.folder_name(variant))

    def code_comment(self, variant: Variant, model: str) -> list[str]:
        return [] if variant.source else on_the_spot.code_comment(variant, model, self.title)
