"""A column → the plain transformers (and peft) code that reproduces it. Text only: runs and imports nothing heavy.

What the text is made of may come from a stranger's document, and people run what they copy from here. So every
value enters as a Python literal (`repr`), notations are parsed and printed again, versions have to look like
versions, and no comment quotes anything else.
"""

from __future__ import annotations

import re
from dataclasses import replace

from comparator.adapters import builtin_names
from comparator.adapters.compatibility import EMBEDDINGS, HEADS
from comparator.backends import backend_for, resolve
from comparator.backends.base import Backend, Placement
from comparator.backends.options import KV_CACHE
from comparator.core.request import BUILTIN_MODEL
from comparator.core.result import CellResult, Comparison
from comparator.core.variant import Adapter, Variant, parse_adapter
from comparator.decoding import kv_cache

_VERSION = re.compile(r"\d[0-9A-Za-z.]*")


def snippet(result: CellResult, comparison: Comparison) -> str:
    """A complete script that loads what this column ran and generates from the same token ids.

    Greedy columns give the same tokens; for sampled ones the script says why they cannot. Raises `UserError` if the
    column's method or options are not known here.
    """
    variant = resolve(result.variant)
    adapter = parse_adapter(result.adapter) if result.adapter else None
    backend = backend_for(variant)
    placement, spread = _placement(result)
    imports, setup, arguments = backend.code(variant, placement, layers=result.layers, kernel=result.kernel)
    device_map = '"auto"' if spread else repr({"": placement.device})
    model_lines, model_imports = _model(result, comparison)
    revision = _revision(result, comparison)
    weights, weights_revision = "MODEL", revision
    if own := backend.code_weights(variant):
        weights, weights_revision = own, variant.revision
    lines = [
        *_heading(variant, adapter, backend, comparison),
        *_imports(imports, model_imports, adapter),
        "",
        *model_lines,
        *backend.code_comment(variant, _source(result, comparison)),
        *setup,
        f"tokenizer = AutoTokenizer.from_pretrained(MODEL{_keyword('revision', revision)})",
        "model = AutoModelForCausalLM.from_pretrained(",
        f"    {weights},",
        *([f"    revision={weights_revision!r},"] if weights_revision else []),
        *(f"    {argument}," for argument in arguments),
        f"    device_map={device_map},",
        ").eval()",
        *backend.code_after(variant, result.layers),
        *_untied(adapter, result),
        *_adapter(_pinned(adapter, result)),
        "",
        *_prompt(comparison),
        "",
        *_generate(comparison, result),
    ]
    return "\n".join(lines) + "\n"


def _heading(
    variant: Variant, adapter: Adapter | None, backend: Backend, comparison: Comparison
) -> list[str]:
    packages = comparison.environment.packages
    making = () if variant.source else backend.making
    requirements = [
        "torch", "transformers", "accelerate", *backend.requires, *making, *(["peft"] if adapter else []),
    ]  # fmt: skip
    pins = []
    for name in dict.fromkeys(requirements):
        version = _VERSION.match(packages.get(name, ""))  # 2.13.0+cpu is asked for as 2.13.0
        pins.append(f'"{name}=={version[0]}"' if version else name)
    label = variant.notation + (f" + {adapter.notation}" if adapter else "")
    return [f"# {ascii(label)[1:-1]}, as Quant Comparator ran it", f"# pip install {' '.join(pins)}"]


def _imports(lines: list[str], more: list[str], adapter: Adapter | None) -> list[str]:
    """`from transformers import …` of the backend joins ours; the rest stands below."""
    names, others = {"AutoModelForCausalLM", "AutoTokenizer"}, []
    for line in lines:
        match = re.fullmatch(r"from transformers import ([\w, ]+)", line)
        if match:
            names |= {name.strip() for name in match[1].split(",")}
        elif line != "import torch":
            others.append(line)
    if adapter:
        others.append("from peft import PeftModel")
        if adapter.source in builtin_names():
            more = [*(more or [""]), "from comparator.adapters import builtin_path"]
    return ["import torch", *others, f"from transformers import {', '.join(sorted(names))}", *more]


def _placement(result: CellResult) -> tuple[Placement, bool]:
    """Where the column ran, and whether it was spread over several devices."""
    devices = dict.fromkeys(row.device for row in result.layers)
    recognized = [d for d in devices if re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", d)]
    return Placement(recognized[0] if recognized else "cpu"), len(recognized) > 1


def _source(result: CellResult, comparison: Comparison) -> str:
    return result.model.source if result.model else comparison.model


def _is_gguf(source: str) -> bool:
    return source == BUILTIN_MODEL or source.lower().endswith(".gguf")


def _model(result: CellResult, comparison: Comparison) -> tuple[list[str], list[str]]:
    """(lines that set MODEL, import lines they need)."""
    source = _source(result, comparison)
    if _is_gguf(source):
        return (
            [
                "# The weights are in a GGUF file. Quant Comparator unpacks it once into a folder that transformers",
                "# loads (quantizing it takes that), and puts back what transformers' gguf_file= leaves out: how the",
                "# tokenizer splits digits, stop tokens, rope factors.",
                f"MODEL = str(open_checkpoint({source!r}).path)",
            ],
            ["", "from comparator.sources import open_checkpoint"],
        )
    return [f"MODEL = {_repo(source, _revision(result, comparison))!r}"], []


def _repo(source: str, revision: str | None) -> str:
    return source.partition("@")[0] if revision else source


def _revision(result: CellResult, comparison: Comparison) -> str | None:
    """The commit that was read, of a Hub repo; None for what lies on a disk."""
    return None if _is_gguf(_source(result, comparison)) or not result.model else result.model.revision


def _keyword(name: str, value: str | None) -> str:
    return f", {name}={value!r}" if value else ""


def _pinned(adapter: Adapter | None, result: CellResult) -> Adapter | None:
    """The adapter at the commit that ran: a branch of a Hub repo may have moved since."""
    commit = result.adapter_info.revision if result.adapter_info else None
    return replace(adapter, revision=commit) if adapter and commit else adapter


def _adapter(adapter: Adapter | None) -> list[str]:
    if adapter is None:
        return []
    built_in = adapter.source in builtin_names()
    source = f"builtin_path({adapter.source!r})" if built_in else repr(adapter.source)
    lines = [
        f"model = PeftModel.from_pretrained(model, {source}{_keyword('revision', adapter.revision)}).eval()"
    ]
    if adapter.scale != 1:
        lines += [
            "for module in model.modules():",
            '    if hasattr(module, "scale_layer"):',
            f"        module.scale_layer({adapter.scale!r})",
        ]
    return [*lines, "model = model.merge_and_unload(safe_merge=True)"] if adapter.merged else lines


def _untied(adapter: Adapter | None, result: CellResult) -> list[str]:
    """Where a merge changes the head or the embedding: they must not be one tensor."""
    targets = result.adapter_info.targets if result.adapter_info else ()
    if adapter is None or not adapter.merged or not {*HEADS, *EMBEDDINGS} & set(targets):
        return []
    return [
        "head = model.get_output_embeddings()  # where it shares the embedding's weights, the merge would change both",
        "head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)",
        "model.config.tie_word_embeddings = False",
    ]


def _prompt(comparison: Comparison) -> list[str]:
    prompt = comparison.prompt
    if prompt.chat:
        messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
        messages.append({"role": "user", "content": prompt.text})
        named = f", chat_template={prompt.template!r}" if prompt.template else ""
        variables = f", **{prompt.template_vars!r}" if prompt.template_vars else ""
        lines = [
            f"messages = {messages!r}",
            "text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False"
            f"{named}{variables})",
            'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)',
        ]
    else:
        text = f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text
        lines = [f"text = {text!r}", 'inputs = tokenizer(text, return_tensors="pt").to(model.device)']
    if prompt.token_count is not None:
        lines.append(
            f'assert inputs["input_ids"].shape[1] == {int(prompt.token_count)}, "another tokenizer or chat template"'
        )
    return lines


def _generate(comparison: Comparison, result: CellResult) -> list[str]:
    settings = comparison.settings
    arguments = [f"max_new_tokens={int(settings.max_new_tokens)}", "num_beams=1"]
    comments = []
    if settings.temperature > 0:
        comments = [
            "# Quant Comparator samples with its own noise, drawn from (seed, step, token id), the same for every variant,",
            "# so generate() draws another answer from the same distribution.",
            f"torch.manual_seed({int(settings.seed)})",
        ]
        arguments += ["do_sample=True", f"temperature={settings.temperature!r}", f"top_p={settings.top_p!r}",
                      f"top_k={int(settings.top_k)}"]  # fmt: skip
    else:
        arguments.append("do_sample=False")
    arguments.append(f"repetition_penalty={settings.repetition_penalty!r}")
    if bits := kv_cache.BITS.get(dict(resolve(result.variant).options).get(KV_CACHE.name) or ""):
        comments.append(
            "# q_group_size has to divide a head's size: Quant Comparator takes 16 where 64 does not."
        )
        cache = f'{{"backend": "hqq", "nbits": {bits}, "axis_key": 1, "axis_value": 1, "q_group_size": 64}}'
        arguments += ['cache_implementation="quantized"', f"cache_config={cache}"]
    if result.finish_reason == "stopped":
        comments.insert(0, f"# The column was stopped after {len(result.token_ids)} tokens; this continues.")
    return [
        *comments,
        "with torch.inference_mode():",
        f"    output = model.generate(**inputs, {', '.join(arguments)})",
        'new_tokens = output[0, inputs["input_ids"].shape[1] :].tolist()',
        "print(tokenizer.decode(new_tokens, skip_special_tokens=True))",
    ]
