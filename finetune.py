"""``openvla finetune``: demonstrations in, a checkpoint that everyone can load out.

A run is a YAML file, flags, or both (flags win). It writes into its output folder:
  metrics.jsonl          what was logged, one object a line (and a tracker's files, where one is asked for)
  checkpoints/step-N/    what a broken run goes on from: what is trained, optimiser, random states, position in the data
  adapter/               of LoRA: the adapter
  model/                 the result, whole: predict, publish and trust_remote_code take it as it is

Examples:
  openvla finetune examples/lora_24gb.yaml --data my-dataset --output runs/my-robot
  openvla finetune --model openvla/openvla-7b --data my-dataset --output runs/my-robot --method lora --max-steps 5000
  torchrun --nproc-per-node 8 -m openvla finetune examples/oft_libero.yaml
"""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from .adapters_openvla import answer_modules, idle_modules
from .augmentation import ImageAugmentation
from .checkpoint_folder import appearing_whole, write_card
from .configuration_openvla import DTYPE_FIELD, PLATFORMS, OpenVLAConfig, write_json
from .dataset_statistics import as_norm_stats
from .demonstration_stream import DemonstrationStream
from .demonstrations import open_demonstrations
from .loading import AutoProcessor
from .modeling_openvla import OpenVLAForActionPrediction
from .processing_openvla import OpenVLAProcessor
from .quantization_openvla import fast_dtype, is_quantized, quantization_config
from .training_batch import ActionCollator, answer_metrics
from .training_state import TrainingState, newest_checkpoint

# The ways of the paper's table; LoRA is one of its adapters' targets, QLoRA the same beside 4-bit weights.
METHODS = ("lora", "qlora", "full", "frozen-vision", "sandwich", "last-layer")
EVALUATION_PRESET = "libero"  # the reference's evaluation of what was trained with augmentation
DECAYS = ("constant", "cosine", "step")
STEP_DECAY = 0.1  # of "step": OFT's tenfold


@dataclass
class FinetuneConfig:
    """A run. Every field is a key of the YAML file and a flag (``--max-steps``).

    Attributes:
        model: Folder or Hub id of what is fine-tuned.
        data: Folder of demonstrations, or a list of mappings: ``path``, and where needed ``weight`` and what else
            ``open_demonstrations`` takes (``preset``, ``fields``, ``split``, ``name``).
        output: Folder to write; a run that stands there already goes on.
        method: One of ``METHODS``.
        answer: Fields of ``enable_parallel_decoding`` for OpenVLA-OFT, and ``platform`` for those of ``PLATFORMS``;
            None trains what the model is.
        batch_size: Steps of demonstrations a process and pass.
        accumulation: Passes before the weights move.
        max_steps: How often the weights move.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
        warmup_steps: Steps over which the rate rises from zero.
        decay: "constant", "cosine" to zero at ``max_steps``, or "step": a tenth from ``decay_step`` on.
        decay_step: Of "step".
        max_grad_norm: Gradients are clipped to it; without, fine-tunes have been seen to collapse.
        lora_rank: Of LoRA.
        lora_alpha: Of LoRA.
        lora_dropout: Of LoRA.
        lora_targets: Of LoRA; as ``enable_lora`` takes them.
        skip_bad: Leave out episodes that cannot be used, and count them; else the first one stops the run.
        shuffle_buffer: Samples to shuffle among.
        augment: Crop and colour changes, as the reference trains; the result's processor then prepares images as its
            evaluation does (``image_preset``).
        gradient_checkpointing: Less memory, about a third more time.
        workers: Processes that read data.
        save_steps: How often a checkpoint is written.
        keep: Newest checkpoints that stay.
        log_steps: How often metrics are written.
        tracker: "tensorboard", "wandb" or another of accelerate's; None for metrics.jsonl alone.
        feed_back: Training steps that are answered after the training, to see whether they were learnt.
        seed: Of everything drawn.
        device: "cpu" to stay there; None is the GPU where there is one.
    """

    model: str
    output: str
    data: Any = None
    method: str = "lora"
    answer: dict[str, Any] | None = None
    batch_size: int = 16
    accumulation: int = 1
    max_steps: int = 10_000
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_steps: int = 0
    decay: str = "constant"
    decay_step: int | None = None
    max_grad_norm: float = 1.0
    lora_rank: int = 32
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    lora_targets: str = "all-linear"
    skip_bad: bool = False
    shuffle_buffer: int = 10_000
    augment: bool = True
    gradient_checkpointing: bool = False
    workers: int = 0
    save_steps: int = 1000
    keep: int = 2
    log_steps: int = 10
    tracker: str | None = None
    feed_back: int = 64
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before anything is read."""
        if self.method not in METHODS:
            raise ValueError(f"Unknown method {self.method!r}; allowed: {list(METHODS)}.")
        if self.decay not in DECAYS:
            raise ValueError(f"Unknown decay {self.decay!r}; allowed: {list(DECAYS)}.")
        if self.decay == "step" and self.decay_step is None:
            raise ValueError("decay='step' needs decay_step.")
        for name in ("batch_size", "accumulation", "max_steps", "save_steps", "keep", "log_steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number, 1 or more, got {getattr(self, name)!r}.")
        if not self.learning_rate > 0 or not self.max_grad_norm > 0:
            raise ValueError("learning_rate and max_grad_norm must be positive.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``openvla finetune``: one a field of :class:`FinetuneConfig`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml", help="fields by name; flags win")
    hints = typing.get_type_hints(FinetuneConfig)
    for one in fields(FinetuneConfig):
        flag, default = f"--{one.name.replace('_', '-')}", "" if one.default is MISSING else f"default {one.default}"
        if hints[one.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=default)
            continue
        kind = {int: int, float: float, int | None: int}.get(hints[one.name], str)
        parse = json.loads if one.name == "answer" else kind
        parser.add_argument(flag, type=parse, metavar="JSON" if parse is json.loads else None, help=default)


def run(args: argparse.Namespace) -> int:
    """Fine-tune; returns the exit status."""
    given = read_yaml(args.config) if args.config else {}
    given |= {f.name: getattr(args, f.name) for f in fields(FinetuneConfig) if getattr(args, f.name) is not None}
    finetune(as_config(given, args.config))
    return 0


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError("A configuration file needs PyYAML: pip install 'openvla[train]'") from error
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a mapping of fields, got {type(content).__name__}.")
    return content


def as_config(given: Mapping[str, Any], source: Any = None) -> FinetuneConfig:
    """A run of these fields.

    Raises:
        ValueError: A field is unknown or missing.
    """
    known = [one.name for one in fields(FinetuneConfig)]
    unknown = sorted(set(given) - set(known))
    missing = [name for name in ("model", "output") if given.get(name) is None]
    if unknown or missing:
        where = f" in {source}" if source else ""
        raise ValueError(f"Unknown fields{where}: {unknown}, missing: {missing}. Known: {known}.")
    return FinetuneConfig(**given)


def finetune(config: FinetuneConfig, data: Any = None) -> Path:
    """Fine-tune a model on demonstrations.

    Args:
        config: The run.
        data: In the place of ``config.data``: what has the attribute and the method of :class:`Demonstrations`.

    Returns:
        The folder of the resulting model.

    Raises:
        ValueError: The run, its data and its model do not fit each other; nothing is trained then.
    """
    accelerator = _import_accelerate().Accelerator(
        cpu=config.device == "cpu",
        gradient_accumulation_steps=config.accumulation,
        mixed_precision="bf16" if config.device != "cpu" and fast_dtype() == torch.bfloat16 else "no",
        log_with=config.tracker,
        project_dir=config.output,
    )
    output = Path(config.output)
    data = Demonstrations(config) if data is None else data
    _import_accelerate().utils.set_seed(config.seed, device_specific=True)
    model, processor = build(config, data, accelerator)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "finetune.json", asdict(config))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=config.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(config, step))
    state = TrainingState(model, optimizer, scheduler)
    state.restore(newest_checkpoint(output), accelerator)
    if config.tracker:
        accelerator.init_trackers("openvla", config=asdict(config))
    batches = load_batches(config, data, model, processor, accelerator, skip=state.passes)
    train(config, state, batches, accelerator)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        processor.image_preset = EVALUATION_PRESET if config.augment else None
        feed_back(config, model, processor, data, output)
        export(model, processor, output)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return output / "model"


def _import_accelerate() -> Any:
    try:
        import accelerate
    except ImportError as error:
        raise ImportError(f"openvla finetune needs accelerate: pip install accelerate ({error})") from error
    return accelerate


class Demonstrations:
    """The data of a run.

    Attributes:
        statistics: Of every dataset, by its name.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        if not config.data:
            raise ValueError("A run needs data: a folder of demonstrations, or a list of mappings with their path.")
        entries = [{"path": config.data}] if isinstance(config.data, str) else [dict(entry) for entry in config.data]
        self.weights = [float(entry.pop("weight", 1.0)) for entry in entries]
        self.readers = [open_demonstrations(entry.pop("path"), **entry) for entry in entries]
        self.config = config
        self.statistics = as_norm_stats(self.readers, skip_bad=config.skip_bad)

    def stream(
        self, chunk_length: int, rank: int = 0, world_size: int = 1, batches: int = 0, batch_size: int = 1
    ) -> DemonstrationStream:
        """Samples without end, from behind so many batches on."""
        stream = DemonstrationStream(
            self.readers,
            self.weights,
            chunk_length=chunk_length,
            shuffle_buffer=self.config.shuffle_buffer,
            seed=self.config.seed,
            rank=rank,
            world_size=world_size,
            skip_bad=self.config.skip_bad,
        )
        stream.resume(batches, batch_size)
        return stream


def build(config: FinetuneConfig, data: Any, accelerator: Any) -> tuple[OpenVLAForActionPrediction, OpenVLAProcessor]:
    """The model on its device, with the statistics of the data and what is trained set apart, and its processor."""
    on_cpu = accelerator.device.type == "cpu"
    keywords: dict[str, Any] = {"device_map": {"": str(accelerator.device)}}
    frozen_base = config.method in ("lora", "qlora")
    keywords[DTYPE_FIELD] = fast_dtype(accelerator.device) if frozen_base and not on_cpu else torch.float32
    if config.method == "qlora":
        keywords["quantization_config"] = quantization_config(4, compute_dtype=keywords[DTYPE_FIELD])
    model = OpenVLAForActionPrediction.from_pretrained(config.model, **keywords)
    processor = AutoProcessor.from_pretrained(config.model)
    processor.image_preset = None  # while training; what evaluation needs comes with the result
    if config.answer is not None and not model.config.parallel_decoding:
        answer = dict(config.answer)
        platform = answer.pop("platform", None)
        if platform is not None and platform not in PLATFORMS:
            raise ValueError(f"Unknown platform {platform!r}; allowed: {list(PLATFORMS)}.")
        model.enable_parallel_decoding(**{**PLATFORMS.get(platform, {}), **answer})
    processor.num_images_in_input = model.config.num_images_in_input
    for key, statistics in data.statistics.items():
        model.add_norm_stats(key, statistics)
        model.action_statistics(key)  # raises where the dimensions do not fit
    if len(data.statistics) == 1:
        model.config.default_unnorm_key = next(iter(data.statistics))
    set_trained(model, config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train(), processor


def set_trained(model: OpenVLAForActionPrediction, config: FinetuneConfig) -> None:
    """Let gradients reach what the method trains, and nothing that never runs. OFT's heads are always trained."""
    if config.method in ("lora", "qlora"):
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
    for module in [*trained, *map(model.get_submodule, answer_modules(model))]:
        module.requires_grad_(True)
    for module in idle_modules(model):
        module.requires_grad_(False)
    if model.config.action_head is not None:  # the answer does not go through it
        model.get_output_embeddings().requires_grad_(False)


def rate(config: FinetuneConfig, step: int) -> float:
    """The learning rate's factor at a step."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.decay == "cosine":
        done = min(1.0, max(0, step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
        return warm * 0.5 * (1 + float(np.cos(np.pi * done)))
    return warm * (STEP_DECAY if config.decay == "step" and step >= config.decay_step else 1.0)


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
    config: FinetuneConfig, state: TrainingState, batches: Iterator[dict[str, torch.Tensor]], accelerator: Any
) -> None:
    """Move the weights ``max_steps`` times."""
    model, optimizer = accelerator.prepare(state.model, state.optimizer)
    progress = tqdm(
        total=config.max_steps, initial=state.step, desc="fine-tuning", disable=not accelerator.is_main_process
    )
    gathered: list[dict[str, torch.Tensor]] = []
    while state.step < config.max_steps:
        batch = next(batches)
        state.passes += 1
        with accelerator.accumulate(model):
            output = model(**batch, logits_at_labels=True)
            accelerator.backward(output.loss)
            gathered.append({"train_loss": output.loss.detach(), **answer_metrics(output, batch, state.model)})
            if not accelerator.sync_gradients:
                continue
            norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
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
        raise ValueError(
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


@torch.no_grad()
def feed_back(
    config: FinetuneConfig, model: OpenVLAForActionPrediction, processor: OpenVLAProcessor, data: Any, output: Path
) -> dict[str, float]:
    """Let the model answer steps that it was trained on, and say how well: a collapsed run shows here.

    Returns:
        ``token_accuracy`` for tokens, ``l1_loss`` in [-1, 1] units, and ``distinct``, the share of different answers.
    """
    model.eval()
    collator = ActionCollator(processor, model)
    distances, right, answers = [], [], set()
    # Among action tokens alone, so that a model that has not learnt them is measured too.
    asked = {"return_dict": True, "constrain_actions": model.config.action_head is None}
    for step, _ in zip(data.stream(model.config.chunk_length), range(config.feed_back)):
        inputs = processor(instruction=step.instruction, images=list(step.images))
        proprio = step.proprio if model.config.proprio_dim is not None else None
        answer = model.predict_action(**inputs, unnorm_key=step.dataset, proprio=proprio, **asked)
        wanted = collator.normalized(step).reshape(answer.normalized_actions.shape)
        distances.append(np.abs(answer.normalized_actions - wanted).mean())
        if answer.token_ids is not None:
            right.append((answer.token_ids == model.action_tokenizer.encode(wanted)).mean())
        answers.add(answer.normalized_actions.tobytes())
    found = {"l1_loss": float(np.mean(distances)), "distinct": len(answers) / len(distances)}
    if right:
        found["token_accuracy"] = float(np.mean(right))
    write_json(output / "feed_back.json", {"steps": len(distances), **found})
    print(f"fed back {len(distances)} training steps: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
    if len(answers) == 1 and len(distances) > 1:
        print("WARNING: every frame got the same answer. The run has collapsed; lower learning_rate.")
    return found


def export(model: OpenVLAForActionPrediction, processor: OpenVLAProcessor, output: Path) -> None:
    """Write the adapter, where there is one, and the whole model, merged once, in the base's own dtype."""
    dtype = stored_dtype(model.config._name_or_path)
    if model._lora is not None:
        model.save_pretrained(output / "adapter")
        processor.save_pretrained(output / "adapter")
        model = model.merge_lora() if is_quantized(model) else model.to("cpu").merge_lora()
    with appearing_whole(output / "model") as folder:
        model.to(dtype).save_pretrained(folder)
        processor.save_pretrained(folder)
        write_card(folder, output.name)
    print(f"{output / 'model'}: complete")


def stored_dtype(name_or_path: str) -> torch.dtype:
    """The dtype that a checkpoint's configuration names; float32 where it names none."""
    found = getattr(OpenVLAConfig.from_pretrained(name_or_path), DTYPE_FIELD, None) or torch.float32
    return getattr(torch, found) if isinstance(found, str) else found
