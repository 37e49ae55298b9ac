"""Worker process of ``training.py``: takes a LoRA step for each line on stdin and reports its time and memory.

The code of a side is imported only where that side runs, so that the published code needs no openvla.
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

Side = tuple[torch.nn.Module, Callable[[], torch.Tensor]]
RANK, ALPHA, RATE = 32, 16, 5e-4
NO_CLIPPING = 1e9  # ours clips, the published code does not: the norm is computed, and nothing changes


def peak_bytes(device: str) -> int:
    """Return the peak memory in bytes since the last reset."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def seed_adapters(model: torch.nn.Module) -> int:
    """Give both sides' adapters the same values, by name; return the number of trained parameters."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.removeprefix("base_model.model.").encode()))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / RANK)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def autocast(device: str) -> contextlib.AbstractContextManager:
    """Return autocast to bfloat16 on a GPU."""
    return torch.autocast(device, dtype=torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def ours(name: str, folder: Path, size: str, device: str, stack: contextlib.ExitStack) -> Side:
    """Return this package's model and training step, as ``openvla finetune`` takes it."""
    from openvla.benchmarking.sizes import build_model
    from openvla.training.collator import compute_metrics, model_inputs
    from openvla.training.finetune import HOST_TENSORS, set_adapter_dtype
    from openvla.training.layers import LayerCompiler, prepared_layers

    model, _ = build_model(size, device, torch.bfloat16 if device == "cuda" else torch.float32)
    model.enable_lora(RANK, ALPHA)
    if name == "bf16":
        set_adapter_dtype(model)
    model.to(device).train()
    compiler = None if name == "plain" else LayerCompiler()
    checkpointing = {"selective": "selective", "checkpointing": "full"}.get(name)
    stack.enter_context(prepared_layers(model, compiler, checkpointing))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True if device == "cuda" else None)
    batch = torch.load(folder / "ours.pt", weights_only=True)
    batch = {key: tensor if key in HOST_TENSORS else tensor.to(device) for key, tensor in batch.items()}
    if name == "bf16":
        batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)

    def step() -> torch.Tensor:
        with contextlib.nullcontext() if name == "bf16" else autocast(device):
            output = model(**model_inputs(batch, model), logits_at_labels=True)
        output.loss.backward()
        compute_metrics(output, batch, model)
        torch.nn.utils.clip_grad_norm_(trained, NO_CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        return output.loss.detach()

    return model, step


def reference(folder: Path, code: Path, device: str) -> Side:
    """Return the published code's model, and a training step as in its vla-scripts/finetune.py."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarking"))
    from peft import LoraConfig, get_peft_model
    from reference import build_reference

    about = json.loads((folder / "about.json").read_text())
    dtype = "bfloat16" if device == "cuda" else "float32"
    model, _ = build_reference(code, folder, dtype, device, about["action_tokens"])
    patches = model.vision_backbone.featurizer.patch_embed.num_patches
    # By name, not "all-linear", which peft 0.11.1 reads by endings: it would adapt head, patch embedding and what never
    # runs too. So both sides train the same numbers.
    adapters = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=about["targets"], init_lora_weights="gaussian"
    )
    model = get_peft_model(model, adapters).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    batch = torch.load(folder / "reference.pt", weights_only=True)
    batch = {key: tensor.to(device) for key, tensor in batch.items()}
    batch["pixel_values"] = batch["pixel_values"].to(getattr(torch, dtype))
    first_action = about["action_tokens"][0]

    def step() -> torch.Tensor:
        with autocast(device):
            output = model(**batch)
        output.loss.backward()
        predicted = output.logits[:, patches:-1].argmax(dim=2)
        wanted = batch["labels"][:, 1:]
        mask = wanted >= first_action
        (((predicted == wanted) & mask).sum().float() / mask.sum().float()).item()
        loss = output.loss.detach()
        loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return model, step


def main() -> None:
    """Build the model, report that, then take a step for each line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("plain", "compiled", "selective", "bf16", "checkpointing", "reference"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("size")
    parser.add_argument("device")
    parser.add_argument("threads", type=int)
    parser.add_argument("--code", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.perf_counter if args.device == "cuda" or args.threads > 1 else time.process_time
    with contextlib.ExitStack() as stack:
        if args.side == "reference":
            model, take_step = reference(args.folder, args.code, args.device)
        else:
            model, take_step = ours(args.side, args.folder, args.size, args.device, stack)
        trained = seed_adapters(model)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # what building took at its peak does not count
        print("READY " + json.dumps({}), flush=True)
        for _ in sys.stdin:
            started = clock()
            loss = float(take_step())
            if args.device == "cuda":
                torch.cuda.synchronize()
            result = {"seconds": clock() - started, "loss": loss, "trained": trained}
            print("DONE " + json.dumps({**result, "peak": peak_bytes(args.device)}), flush=True)


if __name__ == "__main__":
    main()
