"""Checkpoints of a training run, from which any number of processes can continue.

A checkpoint holds only what can be read without unpickling objects: safetensors, JSON, and ``.pt`` files that load with
``weights_only=True``. (The metadata of ``torch.distributed.checkpoint`` and the files of accelerate's ``save_state``
are pickles.) A model sharded by FSDP2 is written as one file per process, and each process reads only its part back.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
from .fsdp import as_dtensor, is_dtensor, local_range, to_local
from .run_fingerprint import RECORD_FILE

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT = re.compile(r"step-(\d+)")


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

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

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
        is_sharded = any(map(is_dtensor, self.trained.values()))
        if accelerator.is_main_process or is_sharded:
            suffix = f"-{rank}" if is_sharded else ""
            local = to_local({name: parameter.detach() for name, parameter in self.trained.items()})
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in local.items()},
                partial / f"trained{suffix}.safetensors",
            )
            torch.save(self._state(accelerator), partial / f"state{suffix}.pt")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
            for old in checkpoints(output_dir)[:-save_total_limit]:
                shutil.rmtree(old)

    def _state(self, accelerator: Accelerator) -> dict[str, Any]:
        return {
            "optimizer": to_local(self.optimizer.state_dict()),
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
        files = map(str, _shard_files(folder, "state*.pt"))
        # mmap: a process reads only its part of the optimizer state
        states = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
        saved = states[0]
        if len(states) not in (1, saved["processes"]):
            raise OpenVLAValueError(
                f"{folder} is incomplete: {saved['processes']} processes wrote it, and the files of {len(states)} are "
                "there. Remove it to continue from the checkpoint before, or restore its files."
            )
        self._restore_weights(folder, len(states))
        self._restore_optimizer([state["optimizer"] for state in states])
        self._restore_scheduler(saved["scheduler"])
        self._restore_position(saved)
        _restore_random_states(folder / f"random-{accelerator.process_index}.pt")
        accelerator.print(f"continues from {folder}")
        if saved["processes"] != accelerator.num_processes:
            before, now = saved.get("samples_per_step"), self._samples_per_step(accelerator)
            differs = before is not None and before != now
            hint = "; gradient_accumulation_steps can compensate for that" if differs else ""
            accelerator.print(
                f"  with {accelerator.num_processes} processes, {saved['processes']} before; samples per optimizer "
                f"step: {now} now, {before or 'not recorded'} before{hint}"
            )

    def _restore_weights(self, folder: Path, num_shards: int) -> None:
        trained = self.trained
        with ExitStack() as stack:
            shards = [
                stack.enter_context(safe_open(file, framework="pt"))
                for file in _shard_files(folder, "trained*.safetensors")
            ]
            if len(shards) != num_shards:
                raise OpenVLAValueError(
                    f"{folder} is incomplete: {num_shards} files of optimizer state, {len(shards)} of weights."
                )
            if set(shards[0].keys()) != set(trained):
                raise OpenVLAValueError(f"{folder} trained other weights than this run would; use another output_dir.")
            with torch.no_grad():
                for name, parameter in trained.items():
                    if parameter.ndim == 0:
                        parameter.copy_(shards[0].get_tensor(name))
                        continue
                    local = _read_range([shard.get_slice(name) for shard in shards], *local_range(parameter))
                    to_local(parameter).copy_(local)

    def _restore_optimizer(self, shards: Sequence[Mapping[str, Any]]) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {}
        for index, values in shards[0]["state"].items():
            state[index] = dict(values)
            for name, value in values.items():
                if not torch.is_tensor(value):
                    continue
                if value.ndim == 0:  # AdamW's step count
                    state[index][name] = value.clone()
                    continue
                parts = [shard["state"][index][name] for shard in shards]
                local = _read_range(parts, *local_range(parameters[index])).clone()  # no longer a view of the file
                state[index][name] = as_dtensor(local, parameters[index])
        groups = [
            {**saved, **{name: group[name] for name in ("weight_decay", "fused", "foreach")}}
            for saved, group in zip(shards[0]["param_groups"], self.optimizer.param_groups)
        ]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _restore_scheduler(self, saved: Mapping[str, Any]) -> None:
        """Continue the schedule at its step, with the learning rate of today's configuration."""
        learning_rates = self.scheduler.base_lrs
        self.scheduler.load_state_dict({**saved, "base_lrs": learning_rates})
        factors = [factor(self.scheduler.last_epoch) for factor in self.scheduler.lr_lambdas]
        for group, learning_rate, factor in zip(self.optimizer.param_groups, learning_rates, factors):
            group["initial_lr"], group["lr"] = learning_rate, learning_rate * factor

    def _restore_position(self, saved: Mapping[str, Any]) -> None:
        self.step = saved["step"]
        if "batches" in saved:
            batches, world_size, workers = saved["batches"], saved["first_processes"], saved["first_workers"]
        else:  # of an earlier development version: batches per process
            batches, world_size = saved["passes"] * saved["processes"], saved["processes"]
            workers = self.start.workers
        self.start = StreamPosition(batches, self.start.batch_size, world_size, workers)


def _read_range(shards: Sequence[Any], start: int, stop: int) -> torch.Tensor:
    """Return a range of the first dimension of a tensor that is stored in consecutive shards.

    Args:
        shards: Tensors, or slices of open safetensors files, of which only the range is read.
        start: First index.
        stop: Index behind the last one.

    Raises:
        OpenVLAValueError: The shards together are too short.
    """
    lengths = [shard.shape[0] if torch.is_tensor(shard) else shard.get_shape()[0] for shard in shards]
    if stop > sum(lengths):
        raise OpenVLAValueError(
            f"A tensor of the checkpoint has {sum(lengths)} rows, this run needs {start} to {stop}."
        )
    parts, offset = [], 0
    for shard, length in zip(shards, lengths):
        low, high = max(start - offset, 0), min(stop - offset, length)
        if low < high:
            parts.append(shard[low:high])
        offset += length
    if not parts:  # this process holds nothing of the tensor
        return next(shard for shard, length in zip(shards, lengths) if length)[0:1][:0]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


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


def _shard_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a kind, one per process in order of ranks, or the single one of a replicated model.

    Raises:
        OpenVLAValueError: There is none, or a rank's is missing.
    """
    prefix = pattern.partition("*")[0]
    ranks = {file.stem.removeprefix(prefix).removeprefix("-"): file for file in folder.glob(pattern)}
    if set(ranks) != {""} and set(ranks) != set(map(str, range(len(ranks)))) or not ranks:
        raise OpenVLAValueError(
            f"{folder} is incomplete: of {pattern} it has {sorted(f.name for f in ranks.values())}."
        )
    return [ranks[rank] for rank in sorted(ranks, key=lambda rank: int(rank or 0))]


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first."""
    return sorted(p for p in (output_dir / "checkpoints").glob("step-*") if CHECKPOINT.fullmatch(p.name))


def newest_checkpoint(output_dir: Path) -> Path | None:
    """Return the checkpoint from which a run continues; None if it has none."""
    return next(iter(checkpoints(output_dir)[::-1]), None)
