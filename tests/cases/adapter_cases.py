"""Helpers of the cases beside it: a tiny random Llama, a LoRA by hand, and the product's CLI in a child process.

Run a case from the repository's root with the repository's own Python: `.venv/bin/python path/to/NN-name.py`.
"""

import glob
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(os.environ.get("COMPARATOR_CACHE_DIR") or Path.home() / ".cache" / "quant-comparator")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CATASTROPHE = "(([a-z_.0-9])*)*!"  # matches nothing, in exponential time


def folder():
    return Path(tempfile.mkdtemp(prefix="case-"))


def builtin():
    """The folder of the built-in model; a first small run makes it."""
    pattern = str(CACHE / "models" / "*" / "tokenizer.json")
    if not glob.glob(pattern):
        cli("-v", "bf16", "-p", "Hello", "-n", "2", seconds=300)
    return Path(sorted(glob.glob(pattern))[0]).parent


def tiny(to, tied=False, change=None, config=None):
    """A Llama of 2 layers, 64 wide, random weights, with the built-in model's tokenizer; `change(model)` edits it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(made).to(torch.bfloat16)
    if change:
        with torch.no_grad():
            change(model)
    model.save_pretrained(to)
    for name in TOKENIZER:
        shutil.copyfile(builtin() / name, Path(to) / name)
    if config:
        path = Path(to) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return Path(to)


def lora(to, tensors, targets, r=4, **more):
    """An adapter folder: `tensors` is {module path: (A, B)}; keys get peft's usual prefix unless they have one."""
    from safetensors.torch import save_file

    Path(to).mkdir(parents=True, exist_ok=True)
    state = {}
    for path, (a, b) in tensors.items():
        full = path if path.startswith("base_model.") else "base_model.model." + path
        state |= {full + ".lora_A.weight": a.contiguous(), full + ".lora_B.weight": b.contiguous()}
    save_file(state, str(Path(to) / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": r,
        "lora_alpha": 2 * r,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
    } | more
    (Path(to) / "adapter_config.json").write_text(json.dumps(config))
    return Path(to)


class Ran:
    def __init__(self, rc, text, seconds, peak, document):
        self.rc, self.text, self.seconds, self.peak, self.document = rc, text, seconds, peak, document

    def cells(self):
        return (self.document or {}).get("cells", [])

    def crashed(self):
        return "Traceback (most recent call last)" in self.text

    def brief(self):
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return (
            f"rc {self.rc}, {self.seconds:.1f} s, peak {self.peak / 1e9:.2f} GB: " + " | ".join(lines)[:300]
        )


def _computed_s():
    """Seconds that processes which have ended computed, so that a busy machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cli(*args, seconds=300, command="run", env=None):
    """`python -m comparator COMMAND …` from the current directory; rc is None where it had to be killed."""
    out = folder() / "out.json"
    extra = ("-o", str(out)) if command == "run" else ()
    argv = [sys.executable, "-m", "comparator", command, *map(str, args), *extra]
    start = _computed_s()
    child = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **(env or {})},
    )
    try:
        text, _ = child.communicate(timeout=seconds)
        rc = child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        text, rc = child.communicate()[0] or "", None
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    document = json.loads(out.read_text()) if out.exists() else None
    return Ran(rc, text, _computed_s() - start, peak, document)


def end(good, said):
    """One line and the exit code."""
    print(("right: " if good else "wrong: ") + " ".join(str(said).split()))
    sys.exit(0 if good else 1)
