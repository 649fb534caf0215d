"""Helpers of the cases: tiny models on disk, the product's command line in a subprocess, verdicts.

Run from the root of a clone, with its virtual environment's python. Everything is made in a temporary folder and
removed; HF_HUB_OFFLINE is set, so that nothing is asked of the network.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
VOCAB, HIDDEN, LAYERS = 49152, 64, 2
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=128,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)
RANDOM = "decoded, as if nothing were wrong"


def builtin() -> Path:
    """Folder of the built-in model, as the product unpacked it; it is unpacked first where it is not there."""
    cache = Path(os.environ.get("COMPARATOR_CACHE_DIR") or Path.home() / ".cache" / "quant-comparator")
    if not list(cache.glob("models/SmolLM2*/config.json")):
        cli("run", "-v", "bf16", "-p", "Hello", "-n", "1", "--fidelity", "none")
    return sorted(cache.glob("models/SmolLM2*/config.json"))[0].parent


def folder(name="model") -> Path:
    """An empty folder that goes when the case ends."""
    import atexit

    root = Path(tempfile.mkdtemp(prefix="case-"))
    atexit.register(shutil.rmtree, root, True)
    (root / name).mkdir()
    return root / name


def tokenizer_into(path: Path) -> None:
    for name in TOKENIZER:
        if (builtin() / name).exists():
            shutil.copy(builtin() / name, path / name)


def tiny(kind="llama", dtype="bfloat16", path=None, seed=0, **config) -> Path:
    """A random model of two layers, saved with a tokenizer: llama, qwen3, mixtral, qwen2_moe, olmoe …"""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = path or folder()
    torch.manual_seed(seed)
    settings = AutoConfig.for_model(kind, **{**SIZES, "tie_word_embeddings": False, **config})
    AutoModelForCausalLM.from_config(settings).to(getattr(torch, dtype)).save_pretrained(path)
    tokenizer_into(path)
    return path


def cut(layers=LAYERS, **config) -> Path:
    """The built-in model's real weights, its first layers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    path = folder()
    model = AutoModelForCausalLM.from_pretrained(
        builtin(), dtype=torch.bfloat16, num_hidden_layers=layers, **config
    )
    model.save_pretrained(path)
    tokenizer_into(path)
    return path


def weights(path: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def put_weights(path: Path, tensors: dict) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )


def edit_config(path: Path, **changes) -> None:
    """Change config.json; a value of None drops the entry."""
    settings = json.loads((path / "config.json").read_text())
    settings.update(changes)
    (path / "config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if v is not None}, indent=1)
    )


@dataclass
class Said:
    code: int
    text: str  # stdout and stderr
    seconds: float  # of computing, so that a busy machine does not count
    columns: list  # cells of the document
    rows: list  # rows of `layers`

    def cell(self, at=0):
        return self.columns[at] if at < len(self.columns) else None

    @property
    def ok(self) -> bool:
        return self.code == 0

    def names(self, *patterns) -> bool:
        """Whether every pattern is in what was said."""
        flat = re.sub(r"\s+", " ", self.text)
        return all(re.search(p, flat, re.I) for p in patterns)

    @property
    def line(self) -> str:
        """What it answered, in one line."""
        for cell in self.columns:
            if cell.get("error"):
                error = cell["error"]
                text = (
                    " ".join(str(v) for v in error.values() if v) if isinstance(error, dict) else str(error)
                )
                return re.sub(r"\s+", " ", f"{cell['variant']}: {text}")[:400]
        flat = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]+", " ", self.text)).strip()
        return ("every column " + RANDOM) if self.ok and self.columns else flat[-400:]


def computed_s() -> float:
    """Seconds that processes which have ended computed, those that they started included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cli(*args, timeout=300) -> Said:
    began = computed_s()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "comparator", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "COLUMNS": "400", "NO_COLOR": "1"},
        )
        code, text = done.returncode, done.stdout + "\n" + done.stderr
    except subprocess.TimeoutExpired:
        code, text = 124, f"no answer within {timeout} s"
    return Said(code, text, computed_s() - began, [], [])


def run(model, *variants, prompt="Hello there", tokens=4, fidelity="none", extra=(), timeout=300) -> Said:
    """`comparator run`; the cells of its document are in .columns."""
    out = folder("out") / "out.json"
    flags = [part for v in variants or ("bf16",) for part in ("-v", v)]
    said = cli(
        "run",
        "-m",
        model,
        *flags,
        "-p",
        prompt,
        "-n",
        tokens,
        "--fidelity",
        fidelity,
        "-o",
        out,
        *extra,
        timeout=timeout,
    )
    if out.exists():
        said.columns = json.loads(out.read_text())["cells"]
    return said


def layers(model, variant, timeout=300) -> Said:
    """`comparator layers`; its rows are in .rows."""
    out = folder("out") / "rows.json"
    said = cli("layers", "-m", model, "-v", variant, "-o", out, timeout=timeout)
    if out.exists():
        said.rows = json.loads(out.read_text())
    return said


def notes(said: Said) -> str:
    return " ".join(f"{n}" for cell in said.columns for n in cell.get("notes") or []) + " " + said.text


def verdict(right: bool, instead: str = "") -> None:
    print("ok" if right else f"instead: {instead}"[:600])
    sys.exit(0 if right else 1)


def refused(said: Said, *patterns) -> None:
    """Right where no column was decoded, the command ended by itself with an error, and what it says matches."""
    decoded = [cell["variant"] for cell in said.columns if cell.get("text") or cell.get("token_ids")]
    verdict(
        said.code not in (0, 124) and not decoded and said.names(*patterns),
        f"{', '.join(decoded)} {RANDOM}" if decoded else said.line,
    )
