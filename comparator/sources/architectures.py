"""Is this config a causal language model that transformers loads by itself? Says what it is if not.

Reads transformers' own tables from its source text, because importing them imports torch: 20 ms instead of 3 s.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError

_WANTED = "Any causal language model works: Llama, Mistral, Qwen, Gemma, Phi, OPT, BLOOM, GPT-2 …"

# Which table a class stands in → what a person would call it. In the order in which they are asked.
_KINDS = (
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "a vision-language model"),
    ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "a speech model"),
    ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "an encoder-decoder (seq2seq) model"),
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "an encoder-only model (it fills in masked words)"),
    ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "a text classifier"),
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "a token classifier"),
    ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "a model that marks answers in a text"),
    ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES", "a multiple-choice classifier"),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "a vision model"),
    ("MODEL_FOR_IMAGE_MAPPING_NAMES", "a vision model"),
    ("MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES", "a vision model (images and texts)"),
    ("MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES", "a vision model (object detection)"),
    ("MODEL_FOR_CTC_MAPPING_NAMES", "a speech model"),
    ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", "an audio classifier"),
    ("MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES", "an audio-generation model"),
    ("MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING_NAMES", "an audio-generation model"),
    ("MODEL_FOR_PRETRAINING_MAPPING_NAMES", "a model with a pre-training head"),
    ("MODEL_MAPPING_NAMES", "a model without a language-model head"),
)

# Both an encoder and, with is_decoder, a decoder: the class name alone does not tell.
_ENCODERS = {
    "bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip


def check_causal_lm(config: dict[str, Any], source: str) -> str:
    """The architecture's class name. Raises `UserError` that says what the model is when it is no causal LM."""
    named = [a for a in config.get("architectures") or [] if isinstance(a, str)]
    model_type = config.get("model_type")
    tables = _tables()
    causal = tables.get("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {})
    classes = {c for value in causal.values() for c in _as_tuple(value)}
    shown = named[0] if named else model_type or "unknown"

    if not isinstance(model_type, str) or not model_type:
        raise UserError(
            f"The config.json of {source} has no model_type, so transformers cannot tell what it is ({shown}).",
            "Use a checkpoint in transformers' format. " + _WANTED,
        )
    if tables and model_type not in tables.get("CONFIG_MAPPING_NAMES", {}):
        if config.get("auto_map"):
            raise UserError(
                f"{source} ({shown}) runs only with its own Python code, and trust_remote_code is off here.",
                "Use a model whose architecture is part of transformers. " + _WANTED,
            )
        version = importlib.metadata.version("transformers")
        raise UserError(
            f"transformers {version} does not know the architecture {shown} (model_type {model_type}) of {source}.",
            "A newer transformers may know it. " + _WANTED,
        )
    if not tables:  # transformers changed the layout of its tables: judge by the names alone
        if named and not named[0].endswith(("ForCausalLM", "LMHeadModel")):
            raise _not_causal(source, shown, "not a causal language model")
        return shown
    if named and not any(a in classes or _is_old_name(a, model_type, causal) for a in named):
        if _has_text_part(named[0], config) and model_type in causal:
            return _as_tuple(causal[model_type])[0]
        raise _not_causal(source, shown, _kind(named[0], model_type, tables))
    if model_type not in causal or config.get("is_encoder_decoder"):
        raise _not_causal(source, shown, _kind(shown, model_type, tables))
    if model_type in _ENCODERS and not config.get("is_decoder"):
        raise _not_causal(source, shown, "an encoder-only model (is_decoder is not set in its config.json)")
    return named[0] if named else _as_tuple(causal[model_type])[0]


def causal_class_of(model_type: str) -> str | None:
    """The class that `AutoModelForCausalLM` makes for a model_type, or None."""
    value = _tables().get("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {}).get(model_type)
    return _as_tuple(value)[0] if value else None


def _has_text_part(name: str, config: dict[str, Any]) -> bool:
    """A model of text and images whose text part transformers loads alone (Qwen3.5, Llama 4)."""
    return name.endswith("ForConditionalGeneration") and isinstance(config.get("text_config"), dict)


def _is_old_name(name: str, model_type: str, causal: dict) -> bool:
    """Class names that transformers has renamed since: LLaMAForCausalLM, RWForCausalLM."""
    return model_type in causal and name.endswith(("ForCausalLM", "LMHeadModel"))


def _not_causal(source: str, architecture: str, kind: str) -> UserError:
    return UserError(f"{source} is {kind} ({architecture}), not a causal language model.", _WANTED)


def _kind(architecture: str, model_type: str, tables: dict[str, dict]) -> str:
    for name, kind in _KINDS:
        classes = {c for value in tables.get(name, {}).values() for c in _as_tuple(value)}
        if architecture in classes:
            return kind
    for name, kind in _KINDS:  # the class is unknown: what else does this family do?
        if model_type in tables.get(name, {}):
            return kind
    return "a model of another kind"


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


@cache
def _tables() -> dict[str, dict]:
    """transformers' tables by name; empty if they cannot be read."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.origin:
        raise UserError("transformers is not installed.", "Run: pip install -r requirements.txt")
    folder = Path(spec.origin).parent / "models" / "auto"
    found: dict[str, dict] = {}
    for file in ("auto_mappings.py", "configuration_auto.py", "modeling_auto.py"):
        if (folder / file).is_file():
            found |= _literal_tables((folder / file).read_text(encoding="utf-8"))
    complete = "CONFIG_MAPPING_NAMES" in found and "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES" in found
    return found if complete else {}


def _literal_tables(source: str) -> dict[str, dict]:
    """`NAME_MAPPING_NAMES = OrderedDict([...])` of a module, where the list is written out."""
    found = {}
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(target, ast.Name) or not target.id.endswith("_MAPPING_NAMES"):
            continue
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call) and value.args:
            value = value.args[0]
        try:
            found[target.id] = dict(ast.literal_eval(value))
        except (ValueError, TypeError, SyntaxError):
            continue  # built from another table; the ones that we need are not
    return found
