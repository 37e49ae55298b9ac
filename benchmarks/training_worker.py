"""Worker process of ``training.py``: takes a LoRA step for each line on stdin and reports its time and memory.

The code of a side is imported only where that side runs, so that the reference needs no openvla.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

Side = tuple[torch.nn.Module, Callable[[], float], contextlib.AbstractContextManager]  # a step, and what stands around
RANK, ALPHA, RATE = 32, 16, 5e-4
NO_CLIPPING = 1e9  # ours clips, the reference does not: the norm is computed, and nothing changes


def peak_bytes() -> int:
    """Return the peak resident memory in bytes since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def seed_adapters(model: torch.nn.Module) -> int:
    """Give both sides' adapters the same values, by name; return the number of trained parameters."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.removeprefix("base_model.model.").encode()))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / RANK)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def ours(folder: Path, checkpointing: bool) -> Side:
    """Return this package's model and training step."""
    from openvla import OpenVLAForActionPrediction
    from openvla.training.activation_checkpointing import enable_checkpointing
    from openvla.training.collator import compute_metrics, model_inputs
    from openvla.training.memory import memory_efficient_training

    model = OpenVLAForActionPrediction.from_pretrained(folder / "base", torch_dtype=torch.float32)
    model.enable_lora(RANK, ALPHA)
    if checkpointing:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    batch = torch.load(folder / "batch.pt", weights_only=True)

    def step() -> float:
        output = model(**model_inputs(batch, model), logits_at_labels=True)
        output.loss.backward()
        loss = float(output.loss.detach())
        compute_metrics(output, batch, model)
        torch.nn.utils.clip_grad_norm_(trained, NO_CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return model, step, memory_efficient_training(model)


def reference(folder: Path, code: Path) -> Side:
    """Return the published code's model, and a training step as in its vla-scripts/finetune.py."""
    from importlib import import_module

    import timm
    from peft import LoraConfig, get_peft_model

    sys.path.insert(0, str(code.parent))
    modeling = import_module(f"{code.name}.modeling_prismatic")
    configuration = import_module(f"{code.name}.configuration_prismatic")
    written = json.loads((folder / "base" / "config.json").read_text())
    sizes = dict(zip(written["timm_model_ids"], written["timm_model_kwargs"]))
    create = timm.create_model
    timm.create_model = lambda name, **options: create(name, **options, **sizes[name])
    config = configuration.OpenVLAConfig.from_pretrained(folder / "base")
    model = modeling.OpenVLAForActionPrediction.from_pretrained(
        folder / "base", config=config, torch_dtype=torch.float32, low_cpu_mem_usage=True
    )
    # By name, not "all-linear", which peft 0.11.1 reads by endings: it would adapt head, patch embedding and what never
    # runs too. So both sides train the same numbers.
    targets = json.loads((folder / "targets.json").read_text())
    adapters = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, init_lora_weights="gaussian"
    )
    model = get_peft_model(model, adapters).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    batch = torch.load(folder / "batch.pt", weights_only=True)
    patches = model.vision_backbone.featurizer.patch_embed.num_patches
    first_action = written["text_config"]["vocab_size"] - written["pad_to_multiple_of"] - written["n_action_bins"]

    def step() -> float:
        output = model(**batch)
        output.loss.backward()
        predicted = output.logits[:, patches:-1].argmax(dim=2)
        wanted = batch["labels"][:, 1:]
        mask = wanted >= first_action
        (((predicted == wanted) & mask).sum().float() / mask.sum().float()).item()
        loss = output.loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return model, step, contextlib.nullcontext()


def main() -> None:
    """Build the model, report that, then take a step for each line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("ours", "checkpointing", "reference"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("--code", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side == "reference":
        model, step, training = reference(args.folder, args.code.resolve())
    else:
        model, step, training = ours(args.folder, args.side == "checkpointing")
    trained = seed_adapters(model)
    Path("/proc/self/clear_refs").write_text("5")  # what loading took at its peak does not count
    said = {"trained": trained, "before": peak_bytes(), "weights": sum(p.nbytes for p in model.parameters())}
    print("READY " + json.dumps(said), flush=True)
    with training:
        for _ in sys.stdin:
            started = time.perf_counter()
            loss = step()
            said = {"seconds": time.perf_counter() - started, "loss": loss, "peak": peak_bytes()}
            print("DONE " + json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
