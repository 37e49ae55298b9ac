"""Checkpoints of a training run, from which any number of processes can continue.

A checkpoint holds only what can be read without unpickling objects: safetensors, JSON, and ``.pt`` files that load with
``weights_only=True``. (The metadata of ``torch.distributed.checkpoint`` and the files of accelerate's ``save_state``
are pickles.) Tensors are stored full, however many processes share the model.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..configuration_openvla import write_json
from ..data.stream import StreamPosition
from ..errors_openvla import OpenVLAValueError
from .fsdp import distribute_like, gather
from .run_fingerprint import RECORD_FILE

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT = re.compile(r"step-(\d+)")
WEIGHTS_FILE, STATE_FILE = "trained.safetensors", "state.pt"


class TrainingState:
    """Everything that an interrupted run needs to continue exactly.

    Args:
        model: Model, not wrapped; its trainable parameters are saved.
        optimizer: AdamW optimizer of these parameters, in their order.
        scheduler: Learning-rate schedule of ``optimizer``.
        record: Description of the run (``run_fingerprint.run_record``), saved with every checkpoint.
        start: Position in the data if there is no checkpoint.

    Attributes:
        step: Number of optimizer steps taken.
        start: Position in the data at which the processes of today began.
        batches: Number of batches that each of these processes has drawn since.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        record: Mapping[str, Any],
        start: StreamPosition,
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.record = model, optimizer, scheduler, record
        self.start = start
        self.step = self.batches = 0

    def save(self, output_dir: Path, save_total_limit: int, accelerator: Accelerator) -> None:
        """Write checkpoints/step-N atomically, and remove all but the newest checkpoints; every process calls this."""
        folder, rank = output_dir / "checkpoints" / f"step-{self.step:07d}", accelerator.process_index
        partial = folder.with_name(f".{folder.name}.partial")
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_json(partial / RECORD_FILE, self.record)
        accelerator.wait_for_everyone()
        torch.save(_random_states(), partial / f"random-{rank}.pt")
        weights = gather(trained_parameters(self.model), keep=accelerator.is_main_process)
        optimizer = gather(self.optimizer.state_dict(), keep=accelerator.is_main_process)
        if accelerator.is_main_process:
            save_file(weights, partial / WEIGHTS_FILE)
            torch.save({"optimizer": optimizer, **self._state(accelerator)}, partial / STATE_FILE)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
            for old in checkpoints(output_dir)[:-save_total_limit]:
                shutil.rmtree(old)

    def _state(self, accelerator: Accelerator) -> dict[str, Any]:
        return {
            "scheduler": self.scheduler.state_dict(),
            "step": self.step,
            "processes": accelerator.num_processes,
            "samples_per_step": self._samples_per_step(accelerator),
            "batches": self.start.batches + self.batches * accelerator.num_processes,
            "first_processes": self.start.world_size,
            "first_workers": self.start.workers,
        }

    def _samples_per_step(self, accelerator: Accelerator) -> int:
        return self.start.batch_size * accelerator.gradient_accumulation_steps * accelerator.num_processes

    def restore(self, folder: Path | None, accelerator: Accelerator) -> None:
        """Load a checkpoint, which may have been written by another number of processes; None changes nothing.

        Weights, optimizer state, learning-rate schedule and data order continue exactly. Random states do so with the
        same number of processes; a process that did not exist before keeps the state that its seed gave.

        Raises:
            OpenVLAValueError: The checkpoint is incomplete or holds other weights than this run trains.
        """
        if folder is None:
            return
        missing = [name for name in (WEIGHTS_FILE, STATE_FILE) if not (folder / name).is_file()]
        if missing:
            raise OpenVLAValueError(
                f"{folder} is incomplete: it has no {' and no '.join(missing)}. Remove it to continue from the "
                "checkpoint before, or restore its files."
            )
        self._restore_weights(folder / WEIGHTS_FILE)
        saved = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True, mmap=True)
        self._restore_optimizer(saved["optimizer"])
        self._restore_scheduler(saved["scheduler"])
        self.step = saved["step"]
        self.start = StreamPosition(
            saved["batches"], self.start.batch_size, saved["first_processes"], saved["first_workers"]
        )
        _restore_random_states(folder / f"random-{accelerator.process_index}.pt")
        accelerator.print(f"continues from {folder}")
        if saved["processes"] != accelerator.num_processes:
            before, now = saved["samples_per_step"], self._samples_per_step(accelerator)
            hint = "; gradient_accumulation_steps can compensate for that" if before != now else ""
            accelerator.print(
                f"  with {accelerator.num_processes} processes, {saved['processes']} before; samples per optimizer "
                f"step: {now} now, {before} before{hint}"
            )

    def _restore_weights(self, file: Path) -> None:
        with safe_open(file, framework="pt") as weights, torch.no_grad():
            trained = trained_parameters(self.model)
            if set(weights.keys()) != set(trained):
                raise OpenVLAValueError(f"{file} trained other weights than this run would; use another output_dir.")
            for name, parameter in trained.items():
                parameter.copy_(distribute_like(weights.get_tensor(name), parameter))

    def _restore_optimizer(self, saved: Mapping[str, Any]) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {  # the step count is a scalar; copies, because the file may go
            index: {
                name: (distribute_like(tensor, parameters[index]) if tensor.ndim else tensor).clone()
                for name, tensor in values.items()
            }
            for index, values in saved["state"].items()
        }
        groups = [
            {**before, **{name: group[name] for name in ("weight_decay", "fused", "foreach")}}
            for before, group in zip(saved["param_groups"], self.optimizer.param_groups)
        ]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _restore_scheduler(self, saved: Mapping[str, Any]) -> None:
        """Continue the schedule at its step, with the learning rate of today's configuration."""
        learning_rates = self.scheduler.base_lrs
        self.scheduler.load_state_dict({**saved, "base_lrs": learning_rates})
        factors = [factor(self.scheduler.last_epoch) for factor in self.scheduler.lr_lambdas]
        for group, learning_rate, factor in zip(self.optimizer.param_groups, learning_rates, factors):
            group["initial_lr"], group["lr"] = learning_rate, learning_rate * factor


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _random_states() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
        "python": list(random.getstate()),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random_states(file: Path) -> None:
    if not file.is_file():
        return
    states = torch.load(file, weights_only=True)
    torch.set_rng_state(states["torch"])
    np.random.set_state(tuple(states["numpy"]))
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first."""
    return sorted(p for p in (output_dir / "checkpoints").glob("step-*") if CHECKPOINT.fullmatch(p.name))


def newest_checkpoint(output_dir: Path) -> Path | None:
    """Return the checkpoint from which a run continues; None if it has none."""
    return next(iter(checkpoints(output_dir)[::-1]), None)
