"""Adapters on real models: the tokens that peft gives, “none” as if nothing had been there, flat memory, strangers."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from comparator import adapters
from comparator.backends import backend_for, resolve
from comparator.backends.base import Placement
from comparator.core.errors import UserError
from comparator.core.messages import LoadRequest
from comparator.core.request import BUILTIN_MODEL, GenerationSettings
from comparator.core.settings import Settings
from comparator.core.variant import Adapter, parse_adapter
from comparator.engine.local import LocalEngine
from comparator.metrics import layers, memory

PROMPT = "What is the capital of France?"
TARGETS = ["q_proj", "v_proj", "down_proj"]
NEW = 8


@pytest.fixture(scope="module")
def engine(builtin, two_layers):
    engine = LocalEngine(Settings())
    for model in (BUILTIN_MODEL, str(two_layers)):
        engine.open(model, threading.Event())
    yield engine
    engine.unload()


def load(engine: LocalEngine, model, variant: str, adapter: Adapter | str | None = None):
    adapter = parse_adapter(adapter) if isinstance(adapter, str) else adapter
    return engine.load(LoadRequest(str(model), resolve(variant), adapter), threading.Event())


def answer(
    engine: LocalEngine, model, variant: str, adapter: Adapter | str | None = None, new: int = NEW
) -> tuple:
    adapter = parse_adapter(adapter) if isinstance(adapter, str) else adapter
    loaded = load(engine, model, variant, adapter)
    prompt = engine.encode(str(model), PROMPT, None, None)
    settings = GenerationSettings(max_new_tokens=new)
    return engine.generate(loaded.handle, prompt, settings, threading.Event(), adapter=adapter).token_ids


def with_peft(
    engine: LocalEngine, model, variant: str, folder, scale: float = 1.0, merged: bool = False
) -> tuple:
    """The same by peft and `generate`, on a model of its own."""
    prompt = engine.encode(str(model), PROMPT, None, None).token_ids

    def work():
        import torch
        from peft import PeftModel

        chosen = resolve(variant)
        checkpoint = engine._checkpoint(str(model))
        base = backend_for(chosen).load(checkpoint, chosen, Placement("cpu"), lambda *a: None).model
        wrapped = PeftModel.from_pretrained(base, str(folder)).eval()
        for module in wrapped.modules():
            if (
                "ia3.bnb" in type(module).__module__
            ):  # gives fp32, which attention refuses beside bf16 queries
                own = module.forward
                module.forward = lambda x, own=own: own(x).to(x.dtype)
            if scale != 1 and hasattr(module, "scale_layer"):
                module.scale_layer(scale)
        wrapped = wrapped.merge_and_unload() if merged else wrapped
        ids = torch.tensor([prompt])
        out = wrapped.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
        return tuple(out[0].tolist())[len(prompt) :]

    return engine._call(work)


# ---------------------------------------------------------------- every method


@pytest.fixture(scope="module")
def lora(zoo) -> str:
    """A LoRA of rank 4 on q, v and down of both layers, loud enough to change the tokens."""
    return str(zoo("lora"))


@pytest.mark.parametrize(
    "variant",
    [
        "fp32",
        "bf16",
        "int8",
        "nf4",
        *(pytest.param(v, marks=pytest.mark.slow) for v in ("nf4:dq,compute=fp16", "fp4")),
    ],
)
def test_every_method_gives_what_peft_gives_and_none_stays(engine, two_layers, lora, variant):
    before = answer(engine, two_layers, variant)
    given = answer(engine, two_layers, variant, lora)
    assert given == with_peft(engine, two_layers, variant, lora)
    assert given != before, "the adapter changed nothing: was it put on?"
    assert answer(engine, two_layers, variant) == before, (
        "“none” is not what it was before an adapter was there"
    )


def test_fp16_gives_what_peft_gives(engine, two_layers, lora):
    given = answer(engine, two_layers, "fp16", lora, new=4)
    assert given == with_peft(engine, two_layers, "fp16", lora)[:4]


def test_strength_is_pefts_scale(engine, two_layers, lora):
    half = answer(engine, two_layers, "bf16", f"{lora}*0.5")
    assert half == with_peft(engine, two_layers, "bf16", lora, scale=0.5)
    assert answer(engine, two_layers, "bf16", f"{lora}*0") == answer(engine, two_layers, "bf16")
    full = answer(engine, two_layers, "bf16", lora)
    assert full == with_peft(engine, two_layers, "bf16", lora), "a strength stuck"


@pytest.mark.parametrize("variant", ["nf4:dq", pytest.param("int8", marks=pytest.mark.slow)])
def test_ten_switches_leave_everything_as_it_was(engine, two_layers, lora, variant):
    """Memory is counted by tensor and not by process: the process's figure moves by itself."""
    plain = load(engine, two_layers, variant)
    slot = engine._pool.get(plain.handle)
    # “none” last: bitsandbytes keeps which columns were outliers in the latest forward, a few bytes either way.
    with_it, none = (answer(engine, two_layers, variant, a) for a in (lora, None))

    def state() -> tuple:
        def work():
            found = layers.rows(slot.model, slot.backend)
            return memory.unique_bytes(memory.held_tensors(slot.model)), tuple(found), held(slot)

        return engine._call(work)

    def held(slot) -> int:
        worn = slot.adapters.values()
        return sum(memory.unique_bytes(memory.held_tensors(f.peft_model)) for f in worn)

    first, modules = state(), {n: id(m) for n, m in slot.model.named_modules()}
    assert with_it != none
    for _ in range(5):  # on and off
        assert answer(engine, two_layers, variant, lora) == with_it
        assert answer(engine, two_layers, variant) == none
    assert state() == first, "a switch left something behind, or changed how the base is stored"
    assert {n: id(m) for n, m in slot.model.named_modules()} == modules, "the base is another tree of modules"
    assert engine.handle_of(str(two_layers), resolve(variant).notation) == plain.handle, (
        "the base was loaded again"
    )


def test_switching_takes_milliseconds(engine, two_layers, lora):
    answer(engine, two_layers, "bf16", lora, new=1)
    fitted = engine._pool.get(load(engine, two_layers, "bf16").handle).fitted(Adapter(lora))
    answer(engine, two_layers, "bf16", lora, new=1)
    assert fitted.switch_s < 0.25, f"{fitted.switch_s * 1e3:.1f} ms"


def test_figures_of_an_adapter_column(engine, two_layers, lora):
    plain, worn = load(engine, two_layers, "nf4"), load(engine, two_layers, "nf4", lora)
    assert worn.handle == plain.handle, "the base was loaded twice"
    # Independently: as many fp32 values as the file holds; peft widens bf16 for the multiplication.
    count = adapters.describe(adapters.open_adapter(Adapter(lora))).parameters
    assert worn.memory.adapter_bytes == 4 * count
    assert worn.memory.resident_bytes == plain.memory.resident_bytes + 4 * count
    assert (worn.memory.weight_bytes, worn.memory.quant_state_bytes) == (
        plain.memory.weight_bytes,
        plain.memory.quant_state_bytes,
    )
    assert plain.memory.adapter_bytes is None
    assert worn.kernel == "bitsandbytes Linear4bit + LoRA"

    base, rows = engine.layers(plain.handle), engine.layers(plain.handle, Adapter(lora))
    assert [r.name for r in rows] == [r.name for r in base], "peft's names reached the rows"
    assert sum(r.bytes for r in rows) == worn.memory.weight_bytes
    assert sum(r.adapter_bytes or 0 for r in rows) == worn.memory.adapter_bytes
    by_name = {r.name: r for r in rows}
    carries = by_name["model.layers.0.self_attn.q_proj.weight"]
    assert (carries.module_class, carries.adapter_rank, carries.adapter_dtype) == (
        "bitsandbytes Linear4bit + LoRA",
        4,
        "fp32",
    )
    assert by_name["model.layers.0.self_attn.k_proj.weight"].adapter_rank is None
    assert sum(r.adapter_rank is not None for r in rows) == 6, "three modules in each of two layers"
    assert all(r.adapter_rank is None for r in base)


def test_two_visitors_with_different_adapters_never_see_each_others_answer(engine, two_layers, lora):
    """Their turns alternate on one base, chunk by chunk queued on the engine's one thread."""
    wishes = [None, lora, f"{lora}*0.5", None, lora]
    alone = [answer(engine, two_layers, "bf16", wish) for wish in wishes]
    assert len(set(alone)) == 3
    seen: dict[int, list] = {i: [] for i in range(len(wishes))}

    def visit(number: int) -> None:
        for _ in range(2):
            seen[number].append(answer(engine, two_layers, "bf16", wishes[number]))

    threads = [threading.Thread(target=visit, args=(i,)) for i in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    for number, answers in seen.items():
        assert answers == [alone[number]] * 2, f"visitor {number} ({wishes[number]}) saw another's answer"


def test_stop_takes_the_adapter_off(engine, two_layers, lora):
    none = answer(engine, two_layers, "bf16")
    loaded = load(engine, two_layers, "bf16", lora)
    prompt = engine.encode(str(two_layers), PROMPT, None, None)
    cancel, settings = threading.Event(), GenerationSettings(max_new_tokens=200)
    stopped = engine.generate(
        loaded.handle, prompt, settings, cancel, lambda chunk: cancel.set(), adapter=Adapter(lora)
    )
    assert stopped.finish_reason == "stopped"
    assert answer(engine, two_layers, "bf16") == none


def test_merged_has_a_base_of_its_own(engine, two_layers, lora):
    none = answer(engine, two_layers, "bf16")
    plain, merged = load(engine, two_layers, "bf16"), load(engine, two_layers, "bf16", f"{lora}:merged")
    assert merged.handle != plain.handle
    assert answer(engine, two_layers, "bf16", f"{lora}:merged") == with_peft(
        engine, two_layers, "bf16", lora, merged=True
    )
    assert merged.memory.adapter_bytes == 0
    assert [r.name for r in engine.layers(merged.handle)] == [r.name for r in engine.layers(plain.handle)]
    assert answer(engine, two_layers, "bf16") == none
    assert engine.handle_of(str(two_layers), "bf16") == plain.handle, "a merged base passes for the plain one"
    engine.unload(merged.handle)


def test_merged_into_four_bits(engine, two_layers, lora):
    given = answer(engine, two_layers, "nf4", f"{lora}:merged")
    assert given == with_peft(engine, two_layers, "nf4", lora, merged=True)
    loaded = load(engine, two_layers, "nf4", f"{lora}:merged")
    assert any("quantized again" in note for note in loaded.notes)
    engine.unload(loaded.handle)


# ---------------------------------------------------------------- the built-in model and its pirate


@pytest.mark.parametrize(
    "variant", [*(pytest.param(v, marks=pytest.mark.slow) for v in ("bf16", "int8")), "nf4"]
)
def test_anyone_sees_the_pirate(engine, variant):
    text = engine._tokenizer(engine._checkpoint(BUILTIN_MODEL)).decode(
        answer(engine, BUILTIN_MODEL, variant, "pirate")
    )
    assert text.startswith("Arr, matey!"), text


# ---------------------------------------------------------------- every kind, on two layers


def kinds() -> dict:
    import peft

    def made(**options):
        return lambda: peft.LoraConfig(
            **{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
        )

    return {
        "lora": made(),
        "dora": made(use_dora=True),
        "rslora": made(use_rslora=True),
        "embedding": made(target_modules=["embed_tokens", "q_proj"]),
        "head": made(target_modules=["lm_head", "q_proj"]),
        "both": made(target_modules=["lm_head", "embed_tokens"]),
        "whole head": made(modules_to_save=["lm_head"]),
        "norms": made(modules_to_save=["input_layernorm"]),
        "tokens": made(trainable_token_indices=[1, 2, 500]),
        "patterns": made(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32}),
        "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
        "loha": lambda: peft.LoHaConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
        "lokr": lambda: peft.LoKrConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
        "vera": lambda: peft.VeraConfig(r=16, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "pissa": made(init_lora_weights="pissa", target_modules=["q_proj"]),
    }


KINDS = ("dora", "rslora", "embedding", "head", "both", "whole head", "norms", "tokens", "patterns", "ia3", "loha",
         "lokr", "vera", "prompt", "prefix", "pissa")  # fmt: skip


@pytest.fixture(scope="module")
def zoo(two_layers, tmp_path_factory):
    """`zoo(kind)`: a folder with an adapter of that kind, whose weights are far enough from 0 to be seen."""
    folder = tmp_path_factory.mktemp("zoo")
    louder = {"loha": 8.0, "lokr": 8.0, "vera": 20.0, "prompt": 20.0}

    def make(kind: str) -> Path:
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        path = folder / kind
        if not path.exists():
            model = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.bfloat16)
            torch.manual_seed(3)
            wrapped = get_peft_model(model, kinds()[kind]())
            with torch.no_grad():
                for parameter in wrapped.parameters():
                    if parameter.requires_grad:
                        noise = torch.randn_like(parameter)
                        more = 0.1 * louder.get(kind, 1.0) * torch.randn_like(parameter)
                        parameter.copy_(parameter * (1 + 0.3 * noise) + more)
            wrapped.save_pretrained(str(path))
        return path

    return make


# What is another path on packed weights, and what only has another shape there.
PACKED = ("embedding", "whole head", "tokens", "ia3", "prompt")
ALIKE = ("rslora", "head", "both", "norms", "patterns", "vera", "prefix")


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        *(("bf16", kind) for kind in KINDS),
        *(("nf4:dq", kind) for kind in PACKED),  # dora, pissa, loha and lokr have tests of their own
        *(pytest.param("nf4:dq", kind, marks=pytest.mark.slow) for kind in ALIKE),
    ],
)
def test_every_kind_gives_what_peft_gives_and_none_stays(engine, two_layers, zoo, variant, kind):
    folder = zoo(kind)
    engine.open(str(two_layers), threading.Event())
    plain = load(engine, two_layers, variant)
    none = answer(engine, two_layers, variant)
    rows = engine._call(
        lambda: layers.rows(engine._pool.get(plain.handle).model, engine._pool.get(plain.handle).backend)
    )
    wanted = with_peft(engine, two_layers, variant, folder)
    given = answer(engine, two_layers, variant, Adapter(str(folder)))
    assert given == wanted
    if (kind, variant) != ("prompt", "nf4:dq"):  # two 4-bit layers pass over virtual tokens; bf16 shows them
        assert given != none, "the adapter changed nothing: this test would not see a missing one"
    assert answer(engine, two_layers, variant) == none
    slot = engine._pool.get(plain.handle)
    assert engine._call(lambda: layers.rows(slot.model, slot.backend)) == rows


@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("variant", ["nf4", "gptq"])
def test_what_peft_has_no_packed_layer_for_is_refused_by_name(engine, two_layers, zoo, variant, kind):
    """peft itself fails over shapes, or at the first forward; int8 works."""
    engine.open(str(two_layers), threading.Event())
    with pytest.raises(UserError, match="peft has no Lo.* for (4-bit|GPTQ) layers.*Use bf16 or int8"):
        load(engine, two_layers, variant, Adapter(str(zoo(kind))))
    assert answer(engine, two_layers, "int8", Adapter(str(zoo(kind)))) != answer(engine, two_layers, "int8")


def test_only_what_must_has_a_base_of_its_own(engine, two_layers, zoo):
    engine.open(str(two_layers), threading.Event())
    plain = load(engine, two_layers, "bf16")
    own = {
        kind
        for kind in KINDS
        if load(engine, two_layers, "bf16", Adapter(str(zoo(kind)))).handle != plain.handle
    }
    assert own == {"pissa"}


def test_dora_on_four_bits_takes_the_norm_of_the_real_weight(engine, two_layers, zoo):
    """bitsandbytes repacks 4-bit weights on CPUs with AVX-512, and peft reads them as if it had not. Judged against
    the definition: m × (W + s·BA) / ‖W + s·BA‖, with W as it was dequantized before the repacking."""
    import torch
    from peft import PeftConfig
    from safetensors.torch import load_file

    folder = zoo("dora")
    engine.open(str(two_layers), threading.Event())
    adapter = Adapter(str(folder))
    loaded = load(engine, two_layers, "nf4", adapter)
    name = "model.layers.0.self_attn.v_proj"

    def work():
        slot = engine._pool.get(loaded.handle)
        state = load_file(folder / "adapter_model.safetensors")
        part = {k.split(f"{name}.")[1]: v.float() for k, v in state.items() if name in k}
        scaling = PeftConfig.from_pretrained(str(folder)).lora_alpha / 4
        weight = slot.backend.dequantize(slot.model.get_submodule(name)).float()
        full = weight + scaling * part["lora_B.weight"] @ part["lora_A.weight"]
        wanted = part["lora_magnitude_vector"].view(-1, 1) * full / full.norm(dim=1, keepdim=True)
        x = torch.randn(1, 5, weight.shape[1], generator=torch.Generator().manual_seed(1))
        with torch.inference_mode(), engine.column(loaded.handle, adapter) as column:
            got = column.model.get_submodule(name)(x.to(torch.bfloat16)).float()
        right = x.to(torch.bfloat16).float() @ wanted.T
        return float((got - right).norm() / right.norm())

    assert engine._call(work) < 0.03


# ---------------------------------------------------------------- what goes wrong


def test_what_does_not_fit_is_refused_before_the_base_is_loaded(engine, two_layers):
    engine.unload()
    engine.open(str(two_layers), threading.Event())
    with pytest.raises(UserError, match="layers.2"):
        load(engine, two_layers, "bf16", "pirate")
    assert not engine.state().residents, "the base was loaded for an adapter that cannot fit"


def test_an_incomplete_adapter_leaves_the_base_usable(engine, two_layers, zoo, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    engine.open(str(two_layers), threading.Event())
    none = answer(engine, two_layers, "bf16")
    folder = shutil.copytree(zoo("rslora"), tmp_path / "a")
    state = load_file(folder / "adapter_model.safetensors")
    state.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"layers.1.self_attn.q_proj"):
        answer(engine, two_layers, "bf16", Adapter(str(folder)))
    assert answer(engine, two_layers, "bf16") == none


def test_an_adapter_of_an_unknown_kind(engine, two_layers, zoo, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(zoo("rslora"), tmp_path / "a")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": "TOMORROW"}))
    engine.open(str(two_layers), threading.Event())
    with pytest.raises(UserError, match="TOMORROW"):
        answer(engine, two_layers, "bf16", Adapter(str(folder)))


def test_a_column_that_fails_leaves_the_others_alone(two_layers, zoo, engine):
    from comparator.comparison.runner import compare
    from comparator.core.events import Done
    from comparator.core.request import Request
    from comparator.core.variant import Cell

    bf16 = resolve("bf16")
    cells = (Cell(bf16), Cell(bf16, Adapter("pirate")), Cell(bf16, Adapter(str(zoo("rslora")))))
    request = Request(
        str(two_layers), cells, PROMPT, settings=GenerationSettings(max_new_tokens=4), fidelity="none"
    )
    done = list(compare(request, engine=engine))[-1]
    assert isinstance(done, Done)
    first, bad, good = done.comparison.cells
    assert (first.status, bad.status, good.status) == ("ok", "failed", "ok")
    assert "layers.2" in bad.error.problem and bad.error.advice
    assert good.adapter_info.kind == "rsLoRA" and good.memory.adapter_bytes > 0
    assert good.latency.load_s is None, "the base was loaded again for the adapter"
    assert good.latency.adapter_switch_s is not None
    assert dataclasses.replace(first.memory, run_peak_bytes=None).adapter_bytes is None


def test_the_effects_drift_is_in_the_document(engine, two_layers, zoo):
    """Measured for columns with an adapter beside the reference's own; int8 is nearer to bf16 than fp4 is."""
    from comparator.comparison.runner import compare
    from comparator.core import document
    from comparator.core.request import Request
    from comparator.core.variant import Cell

    adapter = Adapter(str(zoo("rslora")))
    cells = tuple(Cell(resolve(v), a) for v in ("bf16", "int8", "fp4") for a in (None, adapter))
    settings = GenerationSettings(max_new_tokens=6)
    done = list(compare(Request(str(two_layers), cells, PROMPT, settings=settings), engine=engine))[
        -1
    ].comparison
    assert done.ok, [c.error for c in done.cells]
    drift = {(c.variant, bool(c.adapter)): c.fidelity.adapter for c in done.cells}
    assert [drift[v, False] for v in ("bf16", "int8", "fp4")] == [None] * 3
    assert drift["bf16", True] is None, "the reference's own effect is what the others are measured against"
    int8, fp4 = drift["int8", True], drift["fp4", True]
    assert int8.tokens == fp4.tokens == 6 and int8.effect == pytest.approx(fp4.effect)
    assert 0 <= int8.kl < fp4.kl
    assert document.loads(document.dumps(done)) == done


@pytest.mark.slow
def test_gptq_gives_what_peft_gives_and_none_stays(engine, two_layers, zoo):
    pytest.importorskip("gptqmodel")
    engine.open(str(two_layers), threading.Event())
    completed = engine.complete(str(two_layers), _cell("gptq"), threading.Event())
    variant, folder = completed.variant.notation, zoo("rslora")
    none = answer(engine, two_layers, variant)
    given = answer(engine, two_layers, variant, Adapter(str(folder)))
    assert given == with_peft(engine, two_layers, variant, folder)
    assert given != none
    assert answer(engine, two_layers, variant) == none
    loaded = load(engine, two_layers, variant, Adapter(str(folder)))
    assert loaded.kernel.startswith("gptqmodel ") and loaded.kernel.endswith(" + rsLoRA")
    marked = [r for r in engine.layers(loaded.handle, Adapter(str(folder))) if r.adapter_rank]
    assert len(marked) == 6 and all(r.name.endswith("qweight") for r in marked)
    with pytest.raises(UserError, match="DoRA"):
        load(engine, two_layers, variant, Adapter(str(zoo("dora"))))


def _cell(notation: str):
    from comparator.core.variant import Cell

    return Cell(resolve(notation))
