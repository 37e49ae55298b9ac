"""``openvla finetune``: demonstrations in, a checkpoint that everyone can load out.

A run is a YAML file, flags, or both (flags win). It writes into its output folder:
  data.json              the datasets: their cameras in order, what is trained on, what is left out
  metrics.jsonl          what was logged, one object a line (and a tracker's files, where one is asked for)
  checkpoints/step-N/    what a broken run goes on from: what is trained, optimiser, random states, position in the data
  adapter/               of LoRA: the adapter
  model/                 the result, whole: predict, publish and trust_remote_code take it as it is

Examples:
  openvla finetune examples/lora_24gb.yaml --data my-dataset --output runs/my-robot
  openvla finetune --model openvla/openvla-7b --data my-dataset --output runs/my-robot --method lora --max-steps 5000
  torchrun --nproc-per-node 8 -m openvla finetune examples/oft_libero.yaml
  accelerate launch --multi_gpu --num_processes 8 -m openvla finetune examples/full_8gpu.yaml
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..actions_openvla import nearest_name
from ..adapters.targets import head_modules, unused_modules
from ..compatibility_openvla import DTYPE_FIELD, enable_checkpointing
from ..configuration_openvla import PLATFORMS, write_json
from ..data.augmentation import ImageAugmentation
from ..data.doctor import check_statistics, raise_for_findings
from ..data.open import open_dataset
from ..data.statistics import require_matching, require_names_differ, statistics_and_findings
from ..data.stream import StepStream
from ..data.utils import require
from ..errors_openvla import OpenVLAValueError
from ..inference.quantization import fast_dtype, quantization_config
from ..loading import AutoProcessor
from ..modeling_openvla import OpenVLAForActionPrediction
from ..processing_openvla import OpenVLAProcessor
from .checkpointing import TrainingState, newest_checkpoint
from .collator import ActionCollator, answer_metrics, model_inputs
from .config import LORA_METHODS, FinetuneConfig, add_arguments, as_config, rate, read_yaml  # noqa: F401
from .export import export, feed_back
from .fsdp import shard, trained_weights, whole
from .memory import lean
from .run_fingerprint import require_same_run, run_record

EVALUATION_PRESET = "libero"  # the reference's evaluation of what was trained with augmentation
# What a mapping of a run's data may say.
DATA_ENTRY = ("path", "weight", "name", "preset", "fields", "split")


def run(args: argparse.Namespace) -> int:
    """Fine-tune; returns the exit status."""
    given = read_yaml(args.config) if args.config else {}
    given |= {f.name: getattr(args, f.name) for f in fields(FinetuneConfig) if getattr(args, f.name) is not None}
    finetune(as_config(given, args.config))
    return 0


def finetune(config: FinetuneConfig, data: Any = None) -> Path:
    """Fine-tune a model on demonstrations.

    Args:
        config: The run.
        data: In the place of ``config.data``: what has the attributes and the method of :class:`Demonstrations`.

    Returns:
        The folder of the resulting model, which the main process writes: it is whole when that one returns.

    Raises:
        ValueError: The run, its data and its model do not fit each other, or the data is certainly wrong
            (``data_doctor``) and not accepted; nothing is trained then.
        ImportError: accelerate or the tracker is not installed.
    """
    if config.tracker:  # accelerate leaves a missing one out without a word
        require(config.tracker, f"tracker: {config.tracker}", install=config.tracker)
    accelerator = require("accelerate", "openvla finetune").Accelerator(
        cpu=config.device == "cpu",
        gradient_accumulation_steps=config.accumulation,
        mixed_precision="bf16" if config.device != "cpu" and fast_dtype() == torch.bfloat16 else "no",
        log_with=config.tracker,
        project_dir=config.output,
    )
    _require_processes(config, accelerator)
    output = Path(config.output)
    data = Demonstrations(config) if data is None else data
    findings = {**check_statistics(data.statistics), **getattr(data, "findings", {})}
    raise_for_findings(findings, config.accept, quiet=not accelerator.is_main_process)
    require("accelerate", "openvla finetune").utils.set_seed(config.seed, device_specific=True)
    model, processor = build(config, data, accelerator.device)
    record = run_record(config, data, model, processor)
    record = require_same_run(output, newest_checkpoint(output), record, accelerator.print)
    model.norm_stats = record["norm_stats"]
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "finetune.json", asdict(config))
        report_data(data, model.config.chunk_length, output)
    if config.parallelism == "fsdp":
        half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
        shard(model, accelerator.device, half)
    with lean(model):
        train(config, data, model, processor, accelerator, record)
    weights = None
    if config.parallelism == "fsdp":
        weights = trained_weights(model, keep=accelerator.is_main_process)
    # The processes part here: the others need not wait, and run into a time limit, while the main one writes.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:
        if weights is not None:
            del model  # the shares of it, which those that follow need not stand beside
            accelerator.free_memory()
            model, _ = build(config, data, accelerator.device)
            take_weights(model, weights)
            model.norm_stats = record["norm_stats"]
        processor.image_preset = EVALUATION_PRESET if config.augment else "none"
        feed_back(config, model, processor, data, output)
        export(model, processor, output)
    return output / "model"


def _require_processes(config: FinetuneConfig, accelerator: Any) -> None:
    """Raise ValueError where the processes are not as the run says."""
    kind = str(accelerator.distributed_type.value)
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise OpenVLAValueError(
            f"accelerate was told to distribute by {kind}; launch with --multi_gpu (or torchrun) alone, and say "
            f"parallelism: fsdp here to spread the model."
        )
    if config.parallelism == "fsdp" and accelerator.num_processes == 1:
        raise OpenVLAValueError(
            "parallelism: fsdp spreads a model over several processes, this is one. Launch them: torchrun "
            "--nproc-per-node 8 -m openvla finetune ... (or accelerate launch --multi_gpu), or take parallelism: ddp."
        )


class Demonstrations:
    """The data of a run.

    Attributes:
        statistics: Of every dataset, by its name.
        findings: What ``data_doctor`` found, by the dataset's name; may be missing in the place of ``config.data``.
        readers: Of every dataset; those with which ``statistics`` agree need none.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        if not config.data:
            raise OpenVLAValueError(
                "A run needs data: a folder of demonstrations, or a list of mappings with their path."
            )
        entries = [{"path": config.data}] if isinstance(config.data, str) else [dict(entry) for entry in config.data]
        for entry in entries:
            _require_entry(entry)
        self.weights = [float(entry.pop("weight", 1.0)) for entry in entries]
        self.readers = [open_dataset(entry.pop("path"), **{"preset": config.preset, **entry}) for entry in entries]
        self.config = config
        require_names_differ(self.readers)
        examined = {reader.name: statistics_and_findings(reader, skip_bad=config.skip_bad) for reader in self.readers}
        self.statistics = {name: statistics for name, (statistics, _) in examined.items()}
        self.findings = {name: findings for name, (_, findings) in examined.items()}

    def stream(
        self, chunk_length: int, rank: int = 0, world_size: int = 1, batches: int = 0, batch_size: int = 1
    ) -> StepStream:
        """Samples without end, from behind so many batches on."""
        stream = StepStream(
            self.readers,
            self.weights,
            chunk_length=chunk_length,
            pad_last_chunk=self.config.pad_last_chunk,
            shuffle_buffer=self.config.shuffle_buffer,
            seed=self.config.seed,
            rank=rank,
            world_size=world_size,
            skip_bad=self.config.skip_bad,
        )
        stream.resume(batches, batch_size)
        return stream


def _require_entry(entry: Mapping[str, Any]) -> None:
    """Raise ValueError where a mapping of a run's data has no path, or says something else than data has."""
    unknown = sorted(set(entry) - set(DATA_ENTRY))
    if unknown or not entry.get("path"):
        near = nearest_name(unknown[0], list(DATA_ENTRY)) if unknown else None
        hint = f" Did you mean {near!r}?" if near else ""
        raise OpenVLAValueError(
            f"An entry of data needs a path, and takes {list(DATA_ENTRY[1:])}; got {dict(entry)}, unknown: "
            f"{unknown}.{hint}"
        )


def report_data(data: Any, chunk_length: int, output: Path) -> None:
    """Say of every dataset of a run, in data.json and on the terminal, what is trained on and what is left out."""
    if not data.readers:
        return
    summary = data.stream(chunk_length).summary()
    write_json(output / "data.json", {"datasets": summary})
    for dataset in summary:
        left_out = ", ".join(
            f"{count} {what.replace('_', ' ')}" for what, count in dataset["left_out"].items() if count
        )
        print(
            f"{dataset['name']}: {dataset['episodes']} episodes, {dataset['samples']} samples, cameras "
            f"{', '.join(dataset['cameras'])}; left out: {left_out or 'nothing'}"
        )
        for note in dataset["notes"]:
            print(f"  {note}")


def build(
    config: FinetuneConfig, data: Any, device: torch.device
) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """The model on its device, with the statistics of the data and what is trained set apart, and its processor."""
    keywords: dict[str, Any] = {"device_map": {"": str(device)}}
    frozen_base = config.method in LORA_METHODS
    keywords[DTYPE_FIELD] = fast_dtype(device) if frozen_base and device.type != "cpu" else torch.float32
    if config.method == "qlora":
        keywords["quantization_config"] = quantization_config(4, compute_dtype=keywords[DTYPE_FIELD])
    model = OpenVLAForActionPrediction.from_pretrained(config.model, **keywords)
    processor = AutoProcessor.from_pretrained(config.model)
    processor.image_preset = None  # while training; what evaluation needs comes with the result
    if config.answer is not None:
        set_answer(model, config.answer)
    processor.num_images_in_input = model.config.num_images_in_input
    take_statistics(model, data)
    if len(data.statistics) == 1:
        model.config.default_unnorm_key = next(iter(data.statistics))
    set_trained(model, config)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
        model.enable_input_require_grads()
    return model.train(), processor


def set_answer(model: OpenVLAForActionPrediction, answer: Mapping[str, Any]) -> None:
    """Make a model answer as a run's ``answer`` says.

    Raises:
        ValueError: It already answers in parallel and otherwise, or fields are unknown or contradict each other.
    """
    fields = dict(answer)
    platform = fields.pop("platform", None)
    if platform is not None and platform not in PLATFORMS:
        raise OpenVLAValueError(f"Unknown platform {platform!r}; allowed: {list(PLATFORMS)}.")
    fields = {**PLATFORMS.get(platform, {}), **fields}
    if not model.config.parallel_decoding:
        model.enable_parallel_decoding(**fields)
        return
    own = model.config.action_config
    other = {name: value for name, value in fields.items() if name not in own or own[name] != value}
    if other:
        now = {name: own.get(name) for name in other}
        raise OpenVLAValueError(
            f"answer asks for {other}, but the model already answers with {now}; leave answer out to go on training "
            "what it is, or begin with a model that is no OpenVLA-OFT."
        )


def take_statistics(model: OpenVLAForActionPrediction, data: Any) -> None:
    """Give the model the statistics of the data, in the place of what it may hold under the same names.

    Raises:
        ValueError: The dimensions of the data do not fit the model or what it holds.
    """
    for reader in data.readers:
        if reader.name in model.norm_stats:
            require_matching(model.norm_stats[reader.name], reader)
    for key, statistics in data.statistics.items():
        model.add_norm_stats(key, statistics)
        model.action_statistics(key)  # raises where the dimensions do not fit


def take_weights(model: OpenVLAForActionPrediction, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy trained weights into a model that was built for the same run."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)


def set_trained(model: OpenVLAForActionPrediction, config: FinetuneConfig) -> None:
    """Let gradients reach what the method trains, and nothing that never runs. OFT's heads are always trained."""
    if config.method in LORA_METHODS:
        model.enable_lora(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
        return
    language_model = model.language_model
    last = [model.get_input_embeddings(), language_model.get_decoder().layers[-1], model.get_output_embeddings()]
    trained = {
        "full": [model],
        "frozen-vision": [model.projector, language_model],
        "sandwich": [model.vision_backbone, model.projector, *last],
        "last-layer": last,
    }[config.method]
    model.requires_grad_(False)
    for module in [*trained, *map(model.get_submodule, head_modules(model))]:
        module.requires_grad_(True)
    for module in unused_modules(model):
        module.requires_grad_(False)
    if model.config.action_head is not None:  # the answer does not go through it
        model.get_output_embeddings().requires_grad_(False)


def load_batches(
    config: FinetuneConfig,
    data: Any,
    model: OpenVLAForActionPrediction,
    processor: OpenVLAProcessor,
    accelerator: Any,
    skip: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches on the device, from the one on that a broken run had come to."""
    rank, count = accelerator.process_index, accelerator.num_processes
    stream = data.stream(model.config.chunk_length, rank, count, skip, config.batch_size)
    augment = ImageAugmentation() if config.augment else None
    collator = ActionCollator(processor, model, augment, (config.seed, rank), skip)
    for batch in DataLoader(stream, config.batch_size, collate_fn=collator, num_workers=config.workers):
        yield {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}


def train(
    config: FinetuneConfig,
    data: Any,
    model: OpenVLAForActionPrediction,
    processor: OpenVLAProcessor,
    accelerator: Any,
    record: Mapping[str, Any],
) -> None:
    """Move the weights ``max_steps`` times, from the newest checkpoint on; ``record`` goes into each checkpoint.

    Raises:
        ValueError: The checkpoint does not fit the run, or has moved the weights more than ``max_steps`` times.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(config, step))
    state = TrainingState(model, optimizer, scheduler, record)
    state.restore(newest_checkpoint(Path(config.output)), accelerator)
    if state.step > config.max_steps:
        raise OpenVLAValueError(
            f"{config.output} holds a run of {state.step} steps, max_steps is {config.max_steps}; give {state.step} or "
            "more, or begin in another output folder."
        )
    if config.tracker:
        told = {
            name: value if isinstance(value, (int, float, str)) else json.dumps(value)
            for name, value in asdict(config).items()
        }
        accelerator.init_trackers("openvla", config=told)
    batches = load_batches(config, data, model, processor, accelerator, skip=state.passes)
    optimizer = accelerator.prepare(optimizer)
    if config.parallelism == "ddp":
        model = accelerator.prepare(model)
    progress = tqdm(
        total=config.max_steps, initial=state.step, desc="fine-tuning", disable=not accelerator.is_main_process
    )
    gathered: list[dict[str, torch.Tensor]] = []
    while state.step < config.max_steps:
        batch = next(batches)
        state.passes += 1
        with accelerator.accumulate(model):
            output = model(**model_inputs(batch, state.model), logits_at_labels=True)
            accelerator.backward(output.loss)
            gathered.append({"train_loss": output.loss.detach(), **answer_metrics(output, batch, state.model)})
            if not accelerator.sync_gradients:
                continue
            norm = whole(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()
        state.scheduler.step()
        state.step += 1
        progress.update()
        if state.step % config.log_steps == 0 or state.step == config.max_steps:
            log(config, state, gathered, norm, progress, accelerator)
            gathered = []
        if state.step % config.save_steps == 0 or state.step == config.max_steps:
            state.save(Path(config.output), config.keep, accelerator)
    progress.close()


def log(
    config: FinetuneConfig,
    state: TrainingState,
    gathered: list[dict[str, torch.Tensor]],
    norm: torch.Tensor,
    progress: tqdm,
    accelerator: Any,
) -> None:
    """Write the means over passes and processes since the last time.

    Raises:
        ValueError: The loss is not finite; the last checkpoint is from before that.
    """
    names = gathered[0]
    means = torch.stack([torch.stack([one[name].float() for one in gathered]).mean() for name in names])
    values = dict(zip(names, accelerator.reduce(means, "mean").tolist()))
    if not np.isfinite(values["train_loss"]):
        raise OpenVLAValueError(
            f"The loss at step {state.step} is {values['train_loss']}; lower learning_rate. The newest checkpoint is "
            f"{newest_checkpoint(Path(config.output))}."
        )
    values |= {"gradient_norm": float(norm), "learning_rate": state.scheduler.get_last_lr()[0]}
    accelerator.log(values, step=state.step)
    if accelerator.is_main_process:
        with open(Path(config.output) / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.step, **values}) + "\n")
        shown = {name: f"{value:.3g}" for name, value in values.items() if name != "learning_rate"}
        progress.set_postfix(shown)
