"""Checkpoints of a training run: what a broken run needs to go on exactly where it stood."""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

STATE_FILE, TRAINED_FILE = "state.pt", "trained.safetensors"
CHECKPOINT = re.compile(r"step-(\d+)")


class TrainingState:
    """What a broken run needs to go on exactly: trained weights, optimiser, rate, random states, position.

    Attributes:
        step: Times that the weights have moved.
        passes: Batches taken from the data by this process.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.step = self.passes = 0

    def save(self, output: Path, keep: int, accelerator: Any) -> None:
        """Write checkpoints/step-N, whole or not at all, and remove all but the newest."""
        folder = output / "checkpoints" / f"step-{self.step:07d}"
        partial = folder.with_name(f".{folder.name}.partial")
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        random_states = {
            "torch": torch.get_rng_state(),
            "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
            "python": list(random.getstate()),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        torch.save(random_states, partial / f"random-{accelerator.process_index}.pt")
        if accelerator.is_main_process:
            trained = {n: p.detach().cpu().contiguous() for n, p in self.model.named_parameters() if p.requires_grad}
            save_file(trained, partial / TRAINED_FILE)
            position = {"step": self.step, "passes": self.passes, "processes": accelerator.num_processes}
            kept = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(), **position}
            torch.save(kept, partial / STATE_FILE)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
            for old in checkpoints(output)[:-keep]:
                shutil.rmtree(old)

    def restore(self, folder: Path | None, accelerator: Any) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: It is of another number of processes, or does not fit the run.
        """
        if folder is None:
            return
        kept = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        if kept["processes"] != accelerator.num_processes:
            raise ValueError(f"{folder} is of {kept['processes']} processes; go on with as many, or begin elsewhere.")
        trained, own = load_file(folder / TRAINED_FILE), dict(self.model.named_parameters())
        if set(trained) != {name for name, parameter in own.items() if parameter.requires_grad}:
            raise ValueError(f"{folder} trained other weights than this run would; begin in another output folder.")
        with torch.no_grad():
            for name, tensor in trained.items():
                own[name].copy_(tensor)
        self.optimizer.load_state_dict(kept["optimizer"])
        self.scheduler.load_state_dict(kept["scheduler"])
        self.step, self.passes = kept["step"], kept["passes"]
        states = torch.load(folder / f"random-{accelerator.process_index}.pt", weights_only=True)
        torch.set_rng_state(states["torch"])
        np.random.set_state(tuple(states["numpy"]))
        version, numbers, gauss = states["python"]
        random.setstate((version, tuple(numbers), gauss))
        if states["cuda"]:
            torch.cuda.set_rng_state_all(states["cuda"])
        accelerator.print(f"goes on from {folder}")


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints of a run, the oldest first."""
    return sorted(p for p in (output / "checkpoints").glob("step-*") if CHECKPOINT.fullmatch(p.name))


def newest_checkpoint(output: Path) -> Path | None:
    """Where a broken run goes on; None for a new one."""
    return next(iter(checkpoints(output)[::-1]), None)
