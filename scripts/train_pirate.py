"""Train the built-in adapter `pirate`: a LoRA that makes the built-in model answer like a pirate.

    python scripts/train_pirate.py [--output FOLDER] [--seed 7] [--steps 32]

Plain peft and torch on a CPU, a minute at most. The data is comparator/data/datasets/pirate.jsonl, written for
this project. The loss covers the answers alone. The same seed gives the same file on the same machine: one
order of samples, no dropout, one place where random numbers are drawn.

The weights are stored in bf16 and the rank is 4, which keeps the file under 2 MB with four linear layers a block.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from comparator.training.data import builtin_path  # noqa: E402 - the folder above has to be found first

DATA = builtin_path("pirate")  # what `train --data pirate` reads too
OUTPUT = ROOT / "comparator" / "data" / "adapters" / "pirate"
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the built-in model is; it fits the original too


def samples(tokenizer) -> list[tuple[list[int], int]]:
    """(token ids of prompt and answer, how many of them are prompt) per line of the data."""
    found = []
    for line in DATA.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        asked = [{"role": "user", "content": pair["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(pair["completion"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        found.append((start + answer, len(start)))
    return found


def batch(chosen: list[tuple[list[int], int]], pad: int):
    """Padded ids, mask and labels; -100 where no loss is wanted (the prompt and the padding)."""
    import torch

    width = max(len(ids) for ids, _ in chosen)
    ids = torch.full((len(chosen), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (tokens, start) in enumerate(chosen):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, start : len(tokens)] = torch.tensor(tokens[start:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(
    output: Path, model_name: str = "smollm2-135m", seed: int = 7, steps: int = 32, size: int = 4, rate: float = 2e-3,
    say=print,
) -> list[float]:  # fmt: skip
    """Train and save; returns the loss of every step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from comparator.sources import open_checkpoint

    folder = str(open_checkpoint(model_name, progress=lambda _f, message: say(message)).path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)  # LoRA's A matrices
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", target_modules=TARGETS
    )
    model = get_peft_model(base, config)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    data, order, losses, start = samples(tokenizer), [], [], time.monotonic()
    shuffle = random.Random(seed)
    for step in range(steps):
        if len(order) < size:
            order = shuffle.sample(range(len(data)), len(data))
        chosen, order = order[:size], order[size:]
        with (
            torch.enable_grad()
        ):  # some libraries switch gradients off for the whole thread when they are imported
            loss = model(**batch([data[i] for i in chosen], tokenizer.eos_token_id)).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        say(f"step {step + 1}/{steps}  loss {losses[-1]:.3f}  {time.monotonic() - start:.0f} s")
    save(model, output)
    return losses


def save(model, output: Path) -> None:
    """adapter_config.json and adapter_model.safetensors; nothing of this machine goes in."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    output.mkdir(parents=True, exist_ok=True)
    weights = {
        n: t.to(torch.bfloat16).contiguous() for n, t in sorted(get_peft_model_state_dict(model).items())
    }
    save_file(weights, output / "adapter_model.safetensors", metadata={"format": "pt"})
    (output / "adapter_model.safetensors").chmod(0o644)
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE
    config.inference_mode = True
    config.save_pretrained(str(output))
    written = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    written["target_modules"] = sorted(written["target_modules"])  # peft writes a set: its order is random
    (output / "adapter_config.json").write_text(
        json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=32)
    given = parser.parse_args()
    losses = train(given.output, seed=given.seed, steps=given.steps)
    size = (given.output / "adapter_model.safetensors").stat().st_size
    print(json.dumps({"first_loss": losses[0], "last_loss": losses[-1], "bytes": size, "steps": given.steps}))


if __name__ == "__main__":
    main()
