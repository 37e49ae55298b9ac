"""Checkpoints of a training run: what a broken run needs to go on exactly where it stood."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..configuration_openvla import write_json
from ..errors_openvla import OpenVLAValueError
from .fsdp import is_sharded, share_of, spread_as
from .run_fingerprint import RECORD_FILE

CHECKPOINT = re.compile(r"step-(\d+)")


class TrainingState:
    """What a broken run needs to go on exactly: trained weights, optimiser, rate, random states, position.

    Of a model that is spread over processes each writes and reads its own shares, under its rank.

    Args:
        model: Whose trained weights are kept.
        optimizer: Of it.
        scheduler: A ``LambdaLR`` of it.
        record: What the weights mean (``run_fingerprint.run_record``); it lies in every checkpoint.

    Attributes:
        step: Times that the weights have moved.
        passes: Batches taken from the data by this process.
    """

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, scheduler: Any, record: Mapping[str, Any]) -> None:
        self.model, self.optimizer, self.scheduler, self.record = model, optimizer, scheduler, record
        self.step = self.passes = 0

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _files(self, folder: Path, rank: int) -> tuple[Path, Path]:
        own = f"-{rank}" if any(map(is_sharded, self.trained.values())) else ""
        return folder / f"trained{own}.safetensors", folder / f"state{own}.pt"

    def save(self, output: Path, keep: int, accelerator: Any) -> None:
        """Write checkpoints/step-N, whole or not at all, and remove all but the newest."""
        folder, rank = output / "checkpoints" / f"step-{self.step:07d}", accelerator.process_index
        partial = folder.with_name(f".{folder.name}.partial")
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_json(partial / RECORD_FILE, self.record)
        accelerator.wait_for_everyone()
        random_states = {
            "torch": torch.get_rng_state(),
            "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
            "python": list(random.getstate()),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        torch.save(random_states, partial / f"random-{rank}.pt")
        weights_file, state_file = self._files(partial, rank)
        if accelerator.is_main_process or any(map(is_sharded, self.trained.values())):
            shares = share_of({name: parameter.detach() for name, parameter in self.trained.items()})
            save_file({name: tensor.cpu().contiguous() for name, tensor in shares.items()}, weights_file)
            position = {"step": self.step, "passes": self.passes, "processes": accelerator.num_processes}
            optimizer = share_of(self.optimizer.state_dict())
            torch.save({"optimizer": optimizer, "scheduler": self.scheduler.state_dict(), **position}, state_file)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
            for old in checkpoints(output)[:-keep]:
                shutil.rmtree(old)

    def restore(self, folder: Path | None, accelerator: Any) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: It is of another number of processes or parallelism, or does not fit the run.
        """
        if folder is None:
            return
        weights_file, state_file = self._files(folder, accelerator.process_index)
        if not state_file.is_file():
            raise OpenVLAValueError(
                f"{folder} has no {state_file.name}: it was written under another parallelism or by fewer processes. "
                "Go on as it began, or begin elsewhere."
            )
        kept = torch.load(state_file, map_location="cpu", weights_only=True)
        if kept["processes"] != accelerator.num_processes:
            raise OpenVLAValueError(
                f"{folder} is of {kept['processes']} processes; go on with as many, or begin elsewhere."
            )
        weights, own = load_file(weights_file), self.trained
        if set(weights) != set(own):
            raise OpenVLAValueError(
                f"{folder} trained other weights than this run would; begin in another output folder."
            )
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(spread_as(tensor, own[name]))
        self._restore_optimizer(kept["optimizer"])
        self._restore_rate(kept["scheduler"])
        self.step, self.passes = kept["step"], kept["passes"]
        states = torch.load(folder / f"random-{accelerator.process_index}.pt", weights_only=True)
        torch.set_rng_state(states["torch"])
        np.random.set_state(tuple(states["numpy"]))
        version, numbers, gauss = states["python"]
        random.setstate((version, tuple(numbers), gauss))
        if states["cuda"]:
            torch.cuda.set_rng_state_all(states["cuda"])
        accelerator.print(f"goes on from {folder}")

    def _restore_optimizer(self, kept: dict[str, Any]) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, state in kept["state"].items():  # AdamW's step count has no axis and is nobody's share
            kept["state"][index] = {
                name: spread_as(value, parameters[index]) if torch.is_tensor(value) and value.ndim else value
                for name, value in state.items()
            }
        own = [group["weight_decay"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(kept)
        for group, weight_decay in zip(self.optimizer.param_groups, own):
            group["weight_decay"] = weight_decay

    def _restore_rate(self, kept: dict[str, Any]) -> None:
        """Take over how far the schedule has come; the rate itself is as the run now says."""
        rates = self.scheduler.base_lrs
        self.scheduler.load_state_dict({**kept, "base_lrs": rates})
        factors = [factor(self.scheduler.last_epoch) for factor in self.scheduler.lr_lambdas]
        for group, rate, factor in zip(self.optimizer.param_groups, rates, factors):
            group["initial_lr"], group["lr"] = rate, rate * factor


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints of a run, the oldest first."""
    return sorted(p for p in (output / "checkpoints").glob("step-*") if CHECKPOINT.fullmatch(p.name))


def newest_checkpoint(output: Path) -> Path | None:
    """Where a broken run goes on; None for a new one."""
    return next(iter(checkpoints(output)[::-1]), None)
