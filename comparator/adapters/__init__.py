"""LoRA adapters and their relatives: find one, say what it is, check that it fits, put it on a resident base.

`open_adapter`, `describe` and `check_fit` need no torch: they read adapter_config.json and the header of the
safetensors file. `plan` joins the three; `comparator.adapters.attach` is the part that needs torch and peft.
"""

from __future__ import annotations

from comparator.adapters.compatibility import check_fit
from comparator.adapters.describe import AdapterFacts, describe
from comparator.adapters.locate import AdapterFiles, builtin_names, builtin_path, open_adapter, trained_names
from comparator.adapters.plan import Plan, plan, same_twice

__all__ = [
    "AdapterFacts",
    "AdapterFiles",
    "Plan",
    "builtin_names",
    "builtin_path",
    "check_fit",
    "describe",
    "open_adapter",
    "plan",
    "same_twice",
    "trained_names",
]
