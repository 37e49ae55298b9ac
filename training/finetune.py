"""Fine-tune a model on demonstrations: the ``openvla finetune`` command.

A run is configured by a YAML file, options, or both (options take precedence). It writes to its output folder:
  data.json              the datasets: cameras in order, what is trained on, what is left out
  metrics.jsonl          one JSON object per logged step (and the files of the experiment tracker, if there is one)
  checkpoints/step-N/    trained weights, optimizer state, random states and position in the data, to continue from
  adapter/               the adapter, for LoRA
  model/                 the complete result: predict, publish and trust_remote_code take it as it is

Examples:
  openvla finetune examples/lora_24gb.yaml --data my-dataset --output-dir runs/my-robot
  openvla finetune --model openvla/openvla-7b --data my-dataset --output-dir runs/my-robot --max-steps 5000
  torchrun --nproc-per-node 8 -m openvla finetune examples/oft_libero.yaml
  accelerate launch --multi_gpu --num_processes 8 -m openvla finetune examples/full_8gpu.yaml
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from ..adapters.lora import enable_lora
from ..adapters.parallel_decoding import enable_parallel_decoding
from ..adapters.targets import head_modules, unused_modules
from ..compatibility_openvla import DTYPE_FIELD
from ..configuration_openvla import PLATFORMS, write_json
from ..data.augmentation import ImageAugmentation
from ..data.doctor import check_statistics, raise_for_findings
from ..data.statistics import require_matching
from ..data.stream import StreamPosition
from ..data.utils import require
from ..errors_openvla import OpenVLAValueError
from ..images_openvla import CENTER_CROP_AREA
from ..inference.quantization import fast_dtype, quantization_config
from ..loading import AutoProcessor
from ..modeling_openvla import OpenVLAForActionPrediction
from ..prismatic_openvla import IGNORE_INDEX
from ..processing_openvla import OpenVLAProcessor
from ..vq_openvla import restore_float32
from .checkpointing import TrainingState, newest_checkpoint, trained_parameters
from .collator import ActionCollator, compute_metrics, model_inputs, with_pixel_values
from .config import LORA_METHODS, FinetuneConfig, add_arguments, config_from_dict, lr_lambda, read_yaml  # noqa: F401
from .datasets import Demonstrations, TrainingData, report_data
from .estimate import Estimate, compiles_layers, device_memory, estimate, product_rate
from .export import evaluate_on_train, export
from .fsdp import full_tensor, gather, shard_model
from .layers import LayerCompiler, prepared_layers
from .run_fingerprint import require_same_run, run_record
from .token_loss import action_token_loss

if TYPE_CHECKING:
    from accelerate import Accelerator

# What decides shapes stays on the host, so that no step waits for the device.
HOST_TENSORS = ("labels", "attention_mask")
# Tokens. Batches of few lengths, so that compiled layers are not compiled anew.
LENGTH_MULTIPLE = 16
# For which the other processes wait while the first one writes a checkpoint.
WRITING_TIMEOUT = timedelta(hours=1)
EVALUATION_PRESET = "libero"  # image preset of the reference's evaluation of models trained with augmentation


def run(args: argparse.Namespace) -> int:
    """Fine-tune; return the exit status."""
    values = read_yaml(args.config) if args.config else {}
    options = {field.name: getattr(args, field.name) for field in fields(FinetuneConfig)}
    values |= {name: value for name, value in options.items() if value is not None}
    config = config_from_dict(values, args.config)
    if args.dry_run:
        dry_run(config)
    else:
        finetune(config)
    return 0


def finetune(config: FinetuneConfig, data: TrainingData | None = None) -> Path:
    """Fine-tune a model on demonstrations.

    Args:
        config: Configuration of the run.
        data: Training data to use instead of ``config.data``.

    Returns:
        Folder of the resulting model. The main process writes it, and it is complete when that process returns.

    Raises:
        OpenVLAValueError: Configuration, data and model do not fit each other, or a data check (``data.doctor``) is
            certain that the data is wrong and was not accepted; nothing is trained then.
        ImportError: accelerate or the experiment tracker is not installed.
    """
    accelerator = create_accelerator(config)
    output_dir = Path(config.output_dir)
    data = checked_data(config, data, accelerator)
    require("accelerate", "openvla finetune").utils.set_seed(config.seed, device_specific=True)
    model, processor = load_model_and_processor(config, data, accelerator.device)
    record = run_record(config, data, model, processor)
    record = require_same_run(output_dir, newest_checkpoint(output_dir), record, accelerator.print)
    model.norm_stats = record["norm_stats"]
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "finetune.json", asdict(config))
        report_data(data, model.config.chunk_length, output_dir)
    if config.distributed == "fsdp":
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
        shard_model(model, accelerator.device, dtype)
    train(config, data, model, processor, accelerator, record)
    is_sharded = config.distributed == "fsdp"
    weights = gather(trained_parameters(model), keep=accelerator.is_main_process) if is_sharded else {}
    # The other processes end here: exporting may take longer than a collective operation may wait.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:
        if is_sharded:
            del model  # the sharded one, to free its memory before the complete one is loaded
            accelerator.free_memory()
            model, _ = load_model_and_processor(config, data, accelerator.device)
            for name, parameter in trained_parameters(model).items():
                parameter.data.copy_(weights[name])
            model.norm_stats = record["norm_stats"]
        crops = config.augment and not model.config.trace_prompting
        processor.image_preset = EVALUATION_PRESET if crops else "none"
        if config.num_train_eval_samples:
            evaluate_on_train(config, model, processor, data, output_dir)
        export(model, processor, output_dir)
    return output_dir / "model"


def dry_run(config: FinetuneConfig, data: TrainingData | None = None) -> Estimate:
    """Print what a run would train, its first batch, and the memory and time to expect; no weights are loaded.

    Returns:
        The estimate.

    Raises:
        OpenVLAValueError: As :func:`finetune`; or the run cannot fit into the memory of the device.
    """
    accelerator = create_accelerator(config)
    data = checked_data(config, data, accelerator)
    device = accelerator.device
    torch.set_default_dtype(base_dtype(config, device))
    try:
        with torch.device("meta"):
            model = OpenVLAForActionPrediction(OpenVLAForActionPrediction.config_class.from_pretrained(config.model))
    finally:
        torch.set_default_dtype(torch.float32)
    model.config._name_or_path = config.model
    processor = prepare_training(model, config, data)
    if model.config.action_vq is not None:
        model.action_vq.to_empty(device="cpu")
        restore_float32(model.action_vq, config.model, {})
    collator = ActionCollator(processor, model, pad_to_multiple_of=LENGTH_MULTIPLE)
    stream = data.stream(model.config.chunk_length, history_length=model.config.history_length)
    steps = list(itertools.islice(stream, config.per_device_train_batch_size))
    start = time.perf_counter()
    batch = collator(steps)
    loader_rate = len(steps) / (time.perf_counter() - start)
    for step, ids, labels, mask in zip(steps, batch["input_ids"], batch["labels"], batch["attention_mask"]):
        prompt = processor.tokenizer.decode(ids[(labels == IGNORE_INDEX) & mask.bool()])
        tokens = labels[(labels >= model.action_token_ids.start) & (labels < model.action_token_ids.stop)]
        normalized = model.action_tokenizer.decode(tokens.numpy()).reshape(step.actions.shape)
        actions = model.action_statistics(step.dataset).unnormalize(normalized)
        accelerator.print(
            f"{step.dataset}: {prompt!r}\n  first of {len(actions)} actions: {actions[0].round(3).tolist()}"
        )
    rate = product_rate(device, model.dtype)
    expected = estimate(model, config, batch["input_ids"].shape[1], accelerator.num_processes, rate)
    accelerator.print(expected.describe(device, loader_rate))
    available = device_memory(device)
    if expected.total > available:
        raise OpenVLAValueError(
            f"The run needs about {expected.total / 1e9:.1f} GB, {device} has {available / 1e9:.1f} GB. Use "
            "gradient_checkpointing: true, a smaller per_device_train_batch_size (with gradient_accumulation_steps), "
            "method: lora or qlora, or distributed: fsdp over several GPUs."
        )
    return expected


def checked_data(config: FinetuneConfig, data: TrainingData | None, accelerator: Accelerator) -> TrainingData:
    """Return the training data, by default that of the configuration; raise if a check is certain that it is wrong."""
    data = Demonstrations(config) if data is None else data
    findings = {**check_statistics(data.statistics), **getattr(data, "findings", {})}
    raise_for_findings(findings, config.accept, quiet=not accelerator.is_main_process)
    return data


def base_dtype(config: FinetuneConfig, device: torch.device) -> torch.dtype:
    """Return the dtype in which a run loads its base."""
    return fast_dtype(device) if config.method in LORA_METHODS and device.type != "cpu" else torch.float32


def create_accelerator(config: FinetuneConfig) -> Accelerator:
    """Create the Accelerator of a run.

    Raises:
        OpenVLAValueError: The processes do not fit ``config.distributed``.
        ImportError: accelerate or the experiment tracker is not installed.
    """
    tracker = None if config.report_to == "none" else config.report_to
    if tracker:  # accelerate silently ignores a tracker that is not installed
        require(tracker, f"report_to: {tracker}", install=tracker)
    accelerate = require("accelerate", "openvla finetune")
    accelerator = accelerate.Accelerator(
        cpu=config.use_cpu,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision="bf16" if uses_autocast(config) else "no",
        log_with=tracker,
        project_dir=config.output_dir,
        kwargs_handlers=[accelerate.InitProcessGroupKwargs(timeout=WRITING_TIMEOUT)],
    )
    kind = str(accelerator.distributed_type.value)
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise OpenVLAValueError(
            f"accelerate was launched with {kind}; launch with --multi_gpu (or torchrun) alone, and use distributed: "
            "fsdp here to shard the model."
        )
    if config.distributed == "fsdp" and accelerator.num_processes == 1:
        raise OpenVLAValueError(
            "distributed: fsdp shards a model over several processes, this is one. Launch them: torchrun "
            "--nproc-per-node 8 -m openvla finetune ... (or accelerate launch --multi_gpu), or use distributed: ddp."
        )
    return accelerator


def uses_autocast(config: FinetuneConfig) -> bool:
    """Return whether a run computes under autocast to bfloat16."""
    return config.adapter_dtype == "fp32" and not config.use_cpu and fast_dtype() == torch.bfloat16


def load_model_and_processor(
    config: FinetuneConfig, data: TrainingData, device: torch.device
) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """Load the base model on a device, ready to train, with the statistics of the data; and its processor."""
    kwargs: dict[str, Any] = {"device_map": {"": str(device)}}
    kwargs[DTYPE_FIELD] = base_dtype(config, device)
    if config.method == "qlora":
        kwargs["quantization_config"] = quantization_config(4, compute_dtype=kwargs[DTYPE_FIELD])
    model = OpenVLAForActionPrediction.from_pretrained(config.model, **kwargs)
    return model.train(), prepare_training(model, config, data)


def prepare_training(model: OpenVLAForActionPrediction, config: FinetuneConfig, data: TrainingData) -> OpenVLAProcessor:
    """Give a loaded model its action configuration, statistics and adapters, in place; return its processor."""
    processor = AutoProcessor.from_pretrained(config.model)
    processor.image_preset = None  # none while training; finetune() sets the one for evaluation at the end
    require_fitting_fields(config, model)
    if config.action_config is not None:
        set_action_config(model, config.action_config)
    processor.num_images_in_input = model.config.num_images_in_input
    set_norm_stats(model, data)
    if len(data.statistics) == 1:
        model.config.default_unnorm_key = next(iter(data.statistics))
    set_trainable(model, config)
    if config.adapter_dtype == "bf16":
        set_adapter_dtype(model)
    return processor


def require_fitting_fields(config: FinetuneConfig, model: OpenVLAForActionPrediction) -> None:
    """Raise OpenVLAValueError for fields that are set although this kind of model does not use them."""
    kind = "a TraceVLA" if model.config.trace_prompting else "a MiniVLA with VQ actions"
    if config.action_config is not None and (model.config.trace_prompting or model.config.action_vq is not None):
        raise OpenVLAValueError(
            f"{config.model} is {kind}, which cannot become an OpenVLA-OFT; leave action_config out."
        )
    if config.trace_dropout != FinetuneConfig.trace_dropout and not model.config.trace_prompting:
        raise OpenVLAValueError(f"trace_dropout is for a TraceVLA, which {config.model} is not; leave it out.")
    if config.token_loss != "auto" and (config.action_config is not None or model.config.parallel_decoding):
        raise OpenVLAValueError("token_loss is for models that predict tokens one by one; leave it out.")


def uses_action_token_loss(config: FinetuneConfig, model: OpenVLAForActionPrediction) -> bool:
    """Return whether the loss is that of action tokens alone."""
    automatic = "action_token_only" if model.config.trace_prompting else "full"
    return (automatic if config.token_loss == "auto" else config.token_loss) == "action_token_only"


def set_adapter_dtype(model: OpenVLAForActionPrediction) -> None:
    """Convert what is trained to bfloat16, the dtype of a frozen base.

    Raises:
        OpenVLAValueError: The base has another dtype, in which it computes.
    """
    if model.dtype != torch.bfloat16:
        raise OpenVLAValueError(
            f"adapter_dtype: bf16 needs a base in bfloat16, this one is loaded in {model.dtype}; use adapter_dtype: "
            "fp32."
        )
    for parameter in trained_parameters(model).values():
        parameter.data = parameter.data.to(torch.bfloat16)


def set_action_config(model: OpenVLAForActionPrediction, action_config: Mapping[str, Any]) -> None:
    """Configure how a model predicts actions, as ``FinetuneConfig.action_config`` says.

    Raises:
        OpenVLAValueError: Fields are unknown or contradict each other, or the model is an OpenVLA-OFT model already and
            is configured otherwise.
    """
    requested = dict(action_config)
    platform = requested.pop("platform", None)
    if platform is not None and platform not in PLATFORMS:
        raise OpenVLAValueError(f"Unknown platform {platform!r}; allowed: {list(PLATFORMS)}.")
    requested = {**PLATFORMS.get(platform, {}), **requested}
    if not model.config.parallel_decoding:
        enable_parallel_decoding(model, **requested)
        return
    current = model.config.action_config
    different = {name: v for name, v in requested.items() if name not in current or current[name] != v}
    if different:
        raise OpenVLAValueError(
            f"action_config asks for {different}, but the model already has "
            f"{ {name: current.get(name) for name in different} }; leave action_config out to continue training the "
            "model as it is, or start from a model that is no OpenVLA-OFT."
        )


def set_norm_stats(model: OpenVLAForActionPrediction, data: TrainingData) -> None:
    """Set the model's statistics to those of the data, replacing statistics of the same names.

    Raises:
        OpenVLAValueError: The dimensions of the data differ from the model's, or from those of the replaced statistics.
    """
    for reader in data.readers:
        if reader.name in model.norm_stats:
            require_matching(model.norm_stats[reader.name], reader)
    for key, statistics in data.statistics.items():
        model.add_norm_stats(key, statistics)
        model.action_statistics(key)  # raises if the dimensions do not fit


def set_trainable(model: OpenVLAForActionPrediction, config: FinetuneConfig) -> None:
    """Set ``requires_grad`` as the method says. Action heads are always trained, modules that never run never."""
    if config.method in LORA_METHODS:
        enable_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)
        return
    language_model = cast(PreTrainedModel, model.language_model)
    last = [model.get_input_embeddings(), language_model.get_decoder().layers[-1], model.get_output_embeddings()]
    trained: dict[str, list[nn.Module]] = {
        "full": [model],
        "frozen-vision": [model.projector, language_model],
        "sandwich": [model.vision_backbone, model.projector, *last],
        "last-layer": last,
    }
    model.requires_grad_(False)
    for module in [*trained[config.method], *map(model.get_submodule, head_modules(model))]:
        module.requires_grad_(True)
    for module in unused_modules(model):
        module.requires_grad_(False)
    if model.config.action_head is not None:  # which replaces the LM head
        model.get_output_embeddings().requires_grad_(False)


def load_batches(
    config: FinetuneConfig,
    data: TrainingData,
    model: OpenVLAForActionPrediction,
    processor: OpenVLAProcessor,
    accelerator: Accelerator,
    position: StreamPosition,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this process's batches on its device, from a position in the data on."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    stream = data.stream(
        model.config.chunk_length, rank, world_size, position, history_length=model.config.history_length
    )
    area = 1.0 if model.config.trace_prompting else CENTER_CROP_AREA
    augment = ImageAugmentation(area=area) if config.augment else None
    collator = ActionCollator(
        processor,
        model,
        augment,
        seed=config.seed,
        position=position,
        rank=rank,
        world_size=world_size,
        pad_to_multiple_of=LENGTH_MULTIPLE,
        trace_dropout=config.trace_dropout if model.config.trace_prompting else 0.0,
        normalize=False,
        augment_on_device=config.augment_on_device,
    )
    loader = DataLoader(
        stream,
        config.per_device_train_batch_size,
        collate_fn=collator,
        num_workers=config.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    dtype = torch.bfloat16 if config.adapter_dtype == "bf16" else None
    for batch in loader:
        host = {name: batch.pop(name) for name in HOST_TENSORS}
        moved = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in batch.items()}
        moved = with_pixel_values(moved, processor)
        if dtype is not None:
            moved = {name: t.to(dtype) if t.is_floating_point() else t for name, t in moved.items()}
        yield {**host, **moved}


def train(
    config: FinetuneConfig,
    data: TrainingData,
    model: OpenVLAForActionPrediction,
    processor: OpenVLAProcessor,
    accelerator: Accelerator,
    record: Mapping[str, Any],
) -> None:
    """Train until ``max_steps``, from the newest checkpoint on.

    Args:
        config: Configuration of the run.
        data: Training data.
        model: Model on its device, sharded for FSDP.
        processor: Processor of the model.
        accelerator: Accelerator of the run.
        record: Description of the run, saved with every checkpoint.

    Raises:
        OpenVLAValueError: The checkpoint does not fit the run, or is beyond ``max_steps``; or a loss is not finite.
    """
    output_dir = Path(config.output_dir)
    state = create_training_state(config, model, accelerator, record)
    if config.report_to != "none":
        settings = {k: v if isinstance(v, (int, float, str)) else json.dumps(v) for k, v in asdict(config).items()}
        accelerator.init_trackers("openvla", config=settings)
    batches = load_batches(config, data, model, processor, accelerator, state.start)
    optimizer = accelerator.prepare(state.optimizer)
    wrapped = accelerator.prepare(model) if config.distributed == "ddp" else model
    progress = tqdm(
        total=config.max_steps, initial=state.step, desc="fine-tuning", disable=not accelerator.is_main_process
    )
    compiler = LayerCompiler() if compiles_layers(config) else None
    policy = config.gradient_checkpointing_policy if config.gradient_checkpointing else None
    metrics: list[dict[str, torch.Tensor]] = []
    rates = Rates(config.per_device_train_batch_size * accelerator.num_processes, compiler)
    with progress, prepared_layers(model, compiler, policy):
        while state.step < config.max_steps:
            with rates.waiting():
                batch = next(batches)
            state.batches += 1
            with accelerator.accumulate(wrapped):
                output = wrapped(**model_inputs(batch, model), logits_at_labels=True)
                if uses_action_token_loss(config, model):
                    output.loss = action_token_loss(output.logits, batch["labels"], model.action_token_ids)
                accelerator.backward(output.loss)
                metrics.append({"train_loss": output.loss.detach(), **compute_metrics(output, batch, model)})
                if not accelerator.sync_gradients:
                    continue
                grad_norm = full_tensor(accelerator.clip_grad_norm_(wrapped.parameters(), config.max_grad_norm))
                optimizer.step()
                optimizer.zero_grad()
            state.scheduler.step()
            state.step += 1
            progress.update()
            is_last = state.step == config.max_steps
            if state.step % config.logging_steps == 0 or is_last:
                log(config, state, metrics, grad_norm, rates, progress, accelerator)
                metrics = []
            if state.step % config.save_steps == 0 or is_last:
                state.save(output_dir, config.save_total_limit, accelerator)
                rates.restart()


class Rates:
    """Speed of the run since its last line of metrics.

    Args:
        samples_per_batch: Samples in a micro-batch of all processes.
        compiler: Compiler of the layers; None if they are not compiled.
    """

    def __init__(self, samples_per_batch: int, compiler: LayerCompiler | None) -> None:
        self.samples_per_batch, self.compiler = samples_per_batch, compiler
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self.start, self.waited, self.batches = time.perf_counter(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside this context as waiting for the loader of a batch."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start
        self.batches += 1

    def read(self) -> dict[str, float]:
        """Return the metrics of the interval; call it when the device has finished its last step.

        Returns:
            ``train_samples_per_second`` of all processes; ``data_wait``, the fraction of the time in which this process
            waited for the loader; and ``compiled_graphs``, the number so far, if layers are compiled.
        """
        seconds = max(time.perf_counter() - self.start, 1e-9)
        rates = {
            "train_samples_per_second": self.batches * self.samples_per_batch / seconds,
            "data_wait": self.waited / seconds,
        }
        self.restart()
        return rates if self.compiler is None else {**rates, "compiled_graphs": self.compiler.num_graphs}


def create_training_state(
    config: FinetuneConfig, model: OpenVLAForActionPrediction, accelerator: Accelerator, record: Mapping[str, Any]
) -> TrainingState:
    """Create optimizer and schedule, and restore the newest checkpoint.

    Raises:
        OpenVLAValueError: The checkpoint does not fit the run, or is beyond ``max_steps``.
    """
    trained = list(trained_parameters(model).values())
    fused = True if accelerator.device.type == "cuda" else None
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_lambda(config, step))
    start = StreamPosition(
        batch_size=config.per_device_train_batch_size,
        world_size=accelerator.num_processes,
        workers=max(1, config.dataloader_num_workers),
    )
    state = TrainingState(model, optimizer, scheduler, record, start)
    state.restore(newest_checkpoint(Path(config.output_dir)), accelerator)
    if state.step > config.max_steps:
        raise OpenVLAValueError(
            f"{config.output_dir} holds a run of {state.step} steps, max_steps is {config.max_steps}; set it to "
            f"{state.step} or more, or use another output_dir."
        )
    return state


def log(
    config: FinetuneConfig,
    state: TrainingState,
    metrics: Sequence[Mapping[str, torch.Tensor]],
    grad_norm: torch.Tensor,
    rates: Rates,
    progress: tqdm,
    accelerator: Accelerator,
) -> None:
    """Log the means of metrics over micro-batches and processes.

    Args:
        config: Configuration of the run.
        state: State of the run.
        metrics: Metrics of every micro-batch since the last call.
        grad_norm: Gradient norm of the last optimizer step.
        rates: Speed since the last call.
        progress: Progress bar, which shows the means.
        accelerator: Accelerator of the run.

    Raises:
        OpenVLAValueError: The loss is not finite.
    """
    names = list(metrics[0])
    means = torch.stack([torch.stack([values[name].float() for values in metrics]).mean() for name in names])
    reduced = cast(torch.Tensor, accelerator.reduce(means, "mean"))
    values = dict(zip(names, reduced.tolist()))
    if not np.isfinite(values["train_loss"]):
        raise OpenVLAValueError(
            f"The loss at step {state.step} is {values['train_loss']}; lower learning_rate. The newest checkpoint is "
            f"{newest_checkpoint(Path(config.output_dir))}."
        )
    values |= {"gradient_norm": float(grad_norm), "learning_rate": state.scheduler.get_last_lr()[0], **rates.read()}
    accelerator.log(values, step=state.step)
    if accelerator.is_main_process:
        with open(Path(config.output_dir) / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.step, **values}) + "\n")
        progress.set_postfix({name: f"{value:.3g}" for name, value in values.items() if name != "learning_rate"})
