"""Run as a process: a GGUF file → a safetensors folder that transformers loads like any other checkpoint.

    python -m comparator.sources.convert_gguf

The other end is `util.processes.run_reporting`, with the request {"file", "target", "dtype"}. What GGUF conversion in transformers loses (how digits are split, stop tokens, Llama 3's
rope factors) is put back, and what cannot be is written down in about.json for the reader.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.sources.checkpoint import Progress
from comparator.sources.gguf_header import GgufHeader, read_gguf
from comparator.util import processes
from comparator.util.compat.gguf import read_once
from comparator.util.compat.transformers import gguf_text_splits

# llama.cpp's names of pre-tokenizers (src/llama-vocab.cpp). These split as GPT-2 does, with every digit alone:
_DIGITS_ALONE = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# and these exactly as GPT-2 does, which is what a byte-level tokenizer without further word gets.
_LIKE_GPT2 = {
    "gpt-2",
    "phi-2",
    "mpt",
    "olmo",
    "jina-es",
    "jina-de",
    "jina-v2-es",
    "jina-v2-de",
    "roberta-bpe",
}
_SAMPLE = "The year 2024: 3.14 × 2 = 6.28!\n\tdef f(x):  return x  # ñ 안녕 日本\n"


def main(request: dict[str, str], say: Progress) -> None:
    file, target, dtype = Path(request["file"]), Path(request["target"]), request["dtype"]
    say(0.02, "starting torch and transformers")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    read_once()
    header = read_gguf(file)
    notes: list[str] = []
    if not header.metadata.get("tokenizer.ggml.model"):
        raise UserError(
            "it contains no tokenizer.", "Use another GGUF file of the model, or its safetensors checkpoint."
        )

    say(0.25, "reading the tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    _restore_splitting(tokenizer, header, notes)

    say(0.45, "unpacking the weights")
    model = _load(file, getattr(torch, {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]))
    _restore_rope(model.config, file, header, notes)
    _restore_special_tokens(model, tokenizer, header)
    if header.of_model("context_length"):
        tokenizer.model_max_length = header.of_model("context_length")

    say(0.85, "writing safetensors")
    model.save_pretrained(target, max_shard_size="5GB")
    tokenizer.save_pretrained(target)
    _tidy(target)
    _check_tokenizer(target, tokenizer)
    (target / "about.json").write_text(json.dumps({"notes": notes}, ensure_ascii=False), encoding="utf-8")
    say(0.98, "finishing")


def _load(file: Path, dtype: Any) -> Any:
    import transformers

    extra = {}
    if hasattr(transformers, "GgufConfig"):  # since 5.2x weights stay packed unless told otherwise
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, on_progress = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=dtype, output_loading_info=True, **extra
    )
    missing = sorted(on_progress.get("missing_keys") or ()) + sorted(
        str(k) for k in on_progress.get("mismatched_keys") or ()
    )
    if missing:
        raise UserError(
            f"transformers finds no place in it for {len(missing)} of the model's weights ({missing[0]} …).",
            "Use the model's safetensors checkpoint instead.",
        )
    wrong = {str(p.dtype) for p in model.parameters() if not p.is_floating_point()}
    if wrong:
        raise UserError(
            f"its weights stay packed ({', '.join(wrong)}).",
            "Use the model's safetensors checkpoint instead.",
        )
    # It is a plain model now; these two would make save_pretrained refuse it.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _restore_splitting(tokenizer: Any, header: GgufHeader, notes: list[str]) -> None:
    """How text is cut before the merges: part of what the vocabulary was learned with."""
    from tokenizers import pre_tokenizers

    if header.metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if name in _DIGITS_ALONE:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
        return
    if name not in gguf_text_splits() and name not in _LIKE_GPT2:
        notes.append(
            f"Its tokenizer splits text the “{name}” way, which is not known here; GPT-2's way is used, so some texts "
            "are tokenized differently from the original."
        )


def _restore_rope(config: Any, file: Path, header: GgufHeader, notes: list[str]) -> None:
    """Llama 3's rope scaling, which a GGUF keeps as a tensor of factors and transformers leaves out."""
    if "rope_freqs.weight" not in header.types:
        return
    import gguf

    tensor = next(t for t in gguf.GGUFReader(str(file)).tensors if t.name == "rope_freqs.weight")
    factors = [float(x) for x in tensor.data]
    rope = dict(getattr(config, "rope_parameters", None) or {})
    theta = rope.get("rope_theta") or header.of_model("rope.freq_base") or 10000.0
    guess = {"factor": max(factors), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    guess["original_max_position_embeddings"] = 8192
    expected = llama3_factors(len(factors), theta, **guess)
    if all(math.isclose(a, b, rel_tol=2e-3) for a, b in zip(factors, expected, strict=True)):
        config.rope_parameters = {**rope, "rope_theta": theta, "rope_type": "llama3", **guess}
    elif max(factors) > 1.001:
        notes.append(
            "Its rope factors (rope_freqs) could not be converted: answers to long prompts may be worse."
        )


def llama3_factors(
    count: int, theta: float, *, factor: float, low_freq_factor: float, high_freq_factor: float,
    original_max_position_embeddings: int,
) -> list[float]:  # fmt: skip
    """What llama.cpp writes for rope type llama3 (conversion of Llama 3.1), one factor a frequency."""
    found = []
    for i in range(count):
        wavelength = 2 * math.pi * theta ** (i / count)
        if wavelength < original_max_position_embeddings / high_freq_factor:
            found.append(1.0)
        elif wavelength > original_max_position_embeddings / low_freq_factor:
            found.append(factor)
        else:
            smooth = (original_max_position_embeddings / wavelength - low_freq_factor) / (
                high_freq_factor - low_freq_factor
            )
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def _restore_special_tokens(model: Any, tokenizer: Any, header: GgufHeader) -> None:
    """Where an answer starts and stops, as the file says: in both configs and in the tokenizer."""
    ids = {
        name: header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")
    }
    ids["pad"] = header.metadata.get("tokenizer.ggml.padding_token_id")
    vocabulary = len(tokenizer)
    ids = {name: i for name, i in ids.items() if isinstance(i, int) and 0 <= i < vocabulary}
    for name in ("bos", "eos", "pad"):
        if name in ids:
            setattr(model.config, f"{name}_token_id", ids[name])
            setattr(model.generation_config, f"{name}_token_id", ids[name])
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(ids[name]))
    stops = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids))
    if len(stops) > 1:  # a chat's turn ends with another token than a text does
        model.generation_config.eos_token_id = stops


def _tidy(target: Path) -> None:
    """Leave out what only speaks of this conversion, and write floats as they were meant (1e-05)."""
    for name, drop in (
        ("config.json", ("_model_name_or_path", "_name_or_path")),
        ("generation_config.json", ()),
        ("tokenizer_config.json", ("is_local", "local_files_only", "name_or_path")),
    ):
        file = target / name
        if not file.is_file():
            continue
        values = json.loads(file.read_text(encoding="utf-8"))
        values = {k: _short(v) for k, v in values.items() if k not in drop}
        if name == "tokenizer_config.json" and values.get("tokenizer_class") == "TokenizersBackend":
            values["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that other tools know as well
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _short(value: Any) -> Any:
    """A float that was stored in 32 bits, in as few digits as tell it: 9.999999747378752e-06 → 1e-05."""
    import numpy

    if isinstance(value, float) and abs(value) < 1e6 and float(numpy.float32(value)) == value:
        return float(str(numpy.float32(value)))
    return value


def _check_tokenizer(target: Path, tokenizer: Any) -> None:
    import transformers

    again = transformers.AutoTokenizer.from_pretrained(str(target))
    if again(_SAMPLE).input_ids != tokenizer(_SAMPLE).input_ids:
        raise UserError(
            "its tokenizer changes when it is saved.", "Use the model's safetensors checkpoint instead."
        )


if __name__ == "__main__":
    processes.report(main, "Use the model's safetensors checkpoint instead.")
