"""Opens strangers' checkpoints and runs their tokenizers, as a program of its own: a line of JSON in, a line of JSON out.

    python -m comparator.sources.isolated_process BYTES

A tokenizer.json is a program: rules that replace one character by ten, twenty times over, make text of any size, and
patterns take any time. BYTES is the memory that this process may take beyond what the libraries do. The other end is
`isolated.py`. Ends with its stdin.

In: {"do", "path", "cpu_s", …}. Out: {"result", "cpu_s"}, {"problem", "advice"}, or {"memory": true}. A question that takes
more than its `cpu_s` of computing ends the process with SIGXCPU.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.util import formatting
from comparator.util.recent import Recent

_KEPT = 4  # tokenizers
_MOST_BUILT_BYTES = (
    500_000_000  # of configs and modules without weights; a model of 600B parameters has some 50 MB
)
_SAMPLE = "The year 2024: 3.14 × 2 = 6.28!\n\tdef f(x):  return x  # ñ 안녕 日本 🙂\n"
_tokenizers: Recent[str, Any] = Recent(_KEPT)


def answered(question: dict[str, Any]) -> Any:
    """Raises whatever a checkpoint makes libraries raise."""
    path = Path(question["path"])
    if question["do"] == "open":
        module, _, name = question["opener"].partition(":")
        return getattr(importlib.import_module(module), name)(path, question["source"])
    tokenizer = _tokenizer(path)
    if question["do"] == "encode":
        return list(tokenizer(question["text"], **question["options"])["input_ids"])
    if question["do"] == "decode":
        return tokenizer.decode(question["ids"], **question["options"])
    if question["do"] == "vocabulary":
        return tokenizer.get_vocab()
    return {
        "chat_template": tokenizer.chat_template,
        "special_tokens_map": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "length": len(tokenizer),
        **{f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")},
        **{
            f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
            for name in ("bos", "eos", "pad", "unk")
        },
    }


def open_checkpoint(path: Path, source: str) -> None:
    """What is done with a checkpoint before its weights are loaded. Raises `UserError` for one that cannot be used."""
    from comparator.sources import folder

    folder.inspect(path, source)
    tokenizer = _tokenizer(path)
    tokenizer.decode(tokenizer(_SAMPLE)["input_ids"])
    open_config(path, source)


def open_config(path: Path, source: str) -> None:
    """Builds the modules that its config asks for, without memory for weights. Raises `UserError` where that takes much of
    it all the same: a config may hold numbers of entries that a library makes lists of."""
    before = _peak_bytes(again=True)
    _build(path)
    grew = _peak_bytes() - before
    if grew > _MOST_BUILT_BYTES:
        raise UserError(
            f"config.json of {source} takes {grew / 1e9:.1f} GB to read, before any weight.",
            "Choose another model.",
        )


def _build(path: Path) -> None:
    """As far as it can be built."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except MemoryError:
        raise
    except Exception:
        return  # what is wrong with it, loading it will say


def _tokenizer(path: Path) -> Any:
    from comparator.sources.tokenizer import read_tokenizer

    known = _tokenizers.get(str(path))  # one may be false: it has a length
    return _tokenizers.put(str(path), read_tokenizer(path)) if known is None else known


def _peak_bytes(again: bool = False) -> int:
    """The most memory that this process has held, or from now on where it is counted `again`."""
    try:
        if again:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):  # another kernel: the limit of memory alone
        return 0


def _limit(extra: int) -> None:
    """At most so much more memory than now; without core dumps. Threads of libraries reserve more than they use."""
    try:
        import resource
    except ImportError:  # Windows: the parent's clock alone
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra,) * 2)


def _limit_cpu(seconds: float) -> None:
    """From now on; the next question moves it on."""
    try:
        import resource
    except ImportError:
        return
    soft = int(time.process_time() + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main(extra: int) -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401 - before the limit

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    _limit(extra)
    for line in sys.stdin.buffer:
        began_s = time.process_time()
        try:
            question = json.loads(line)
            _limit_cpu(question["cpu_s"])
            result = answered(question)
            answer = {"result": result, "cpu_s": time.process_time() - began_s}
        except MemoryError:
            answer = {"memory": True}
        except UserError as error:
            answer = {"problem": error.problem, "advice": error.advice}
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            first = formatting.first_line(error, 200)
            answer = {"problem": f"Its tokenizer fails: {first}.", "advice": "Choose another model."}
        out.write(json.dumps(answer).encode() + b"\n")
        out.flush()
        if "memory" in answer:
            os._exit(1)  # the next one begins with all of it


if __name__ == "__main__":
    main(int(sys.argv[1]))
