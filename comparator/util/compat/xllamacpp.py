"""llama.cpp's C interface as the shared object of xllamacpp exports it; written for xllamacpp 2026.10.11549.

Its parameters go by value in structs that change between releases, so the layouts below are of that build alone, and
`layout_problem` compares the defaults that the library returns with what is expected at each place.
"""

from __future__ import annotations

import ctypes
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

WRITTEN_FOR = "2026.10.11549"

SPLIT_NONE, ALL_LAYERS = 0, -1
CACHE_TYPES = {"q4_0": 2, "q8_0": 8}  # ggml_type
FLASH_ATTENTION = 1  # llama_flash_attn_type: enabled


class ModelParams(ctypes.Structure):
    _fields_ = [
        ("devices", c_void_p), ("tensor_buft_overrides", c_void_p), ("n_gpu_layers", c_int32), ("split_mode", c_int32),
        ("load_mode", c_int32), ("lazy_mode", c_int32), ("main_gpu", c_int32), ("tensor_split", c_void_p),
        ("progress_callback", c_void_p), ("progress_callback_user_data", c_void_p), ("kv_overrides", c_void_p),
        ("vocab_only", c_bool), ("check_tensors", c_bool), ("use_extra_bufts", c_bool), ("no_host", c_bool),
        ("no_alloc", c_bool), ("load_mtp", c_bool), ("rest", ctypes.c_ubyte * 250),
    ]  # fmt: skip


class ContextParams(ctypes.Structure):
    _fields_ = [
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32), ("n_outputs_max", c_uint32), ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32), ("n_threads_batch", c_int32), ("ctx_type", c_int32), ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32), ("attention_type", c_int32), ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float), ("rope_freq_scale", c_float), ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float), ("yarn_beta_fast", c_float), ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32), ("defrag_thold", c_float), ("cb_eval", c_void_p), ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32), ("type_v", c_int32), ("pointers", c_void_p * 3), ("embeddings", c_bool),
        ("offload_kqv", c_bool), ("no_perf", c_bool), ("op_offload", c_bool), ("swa_full", c_bool),
        ("kv_unified", c_bool), ("rest", ctypes.c_ubyte * 250),
    ]  # fmt: skip


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    ]  # fmt: skip


LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
AbortCallback = ctypes.CFUNCTYPE(c_bool, c_void_p)

_FUNCTIONS: dict[str, tuple[Any, tuple]] = {  # name → (result, arguments)
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (LogCallback, c_void_p)),
    "llama_print_system_info": (c_char_p, ()),
    "llama_supports_gpu_offload": (c_bool, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParams)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_type": (ctypes.c_int, (c_void_p,)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParams)),
    "llama_free": (None, (c_void_p,)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_batch_init": (Batch, (c_int32, c_int32, c_int32)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_synchronize": (None, (c_void_p,)),
    "llama_set_abort_callback": (None, (c_void_p, AbortCallback, c_void_p)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_get_logits_ith": (POINTER(c_float), (c_void_p, c_int32)),
    "ggml_row_size": (c_size_t, (ctypes.c_int, c_int64)),
    "ggml_quantize_chunk": (
        c_size_t,
        (ctypes.c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),  # fmt: skip
}


def shared_object() -> Path | None:
    """The package's shared object, without importing the package; None where it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    places = (spec.submodule_search_locations or []) if spec else []
    return next((file for place in places for file in sorted(Path(place).glob("xllamacpp*.so"))), None)


def load() -> Any:
    """The library with typed functions. Raises OSError, and AttributeError for a function that is not there."""
    library = ctypes.CDLL(str(shared_object()))
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def layout_problem(library: Any) -> str | None:
    """Which parameter does not have the default that llama.cpp documents at the place where it is expected; None where
    all do."""
    expected = (
        (library.llama_model_default_params(), {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0,
                                                "vocab_only": False, "use_extra_bufts": True, "no_alloc": False}),
        (library.llama_context_default_params(), {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max": 0,
                                                  "n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4,
                                                  "rope_scaling_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1.0,
                                                  "type_k": 1, "type_v": 1, "embeddings": False, "offload_kqv": True,
                                                  "no_perf": True, "op_offload": True, "swa_full": True, "kv_unified": False}),
    )  # fmt: skip
    for struct, fields in expected:
        for field, value in fields.items():
            if (default := getattr(struct, field)) != value:
                return f"{type(struct).__name__}.{field} is {default}, not {value}"
    return None
