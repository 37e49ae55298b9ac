"""Train a VQ autoencoder of action chunks, for MiniVLA's actions: the ``openvla train-vq`` command.

It writes the folder that openvla-mini writes, which ``openvla convert --vq`` takes:
  config.json            sizes of the autoencoder
  checkpoints/model.pt   weights, codebooks and optimizer state, to continue from
  training.json          the run: data, statistics and options
  metrics.jsonl          losses of the logged steps
  reconstruction.json    at the end: error of every action dimension in its unit, and how many codes are used

Examples:
  openvla train-vq my-dataset vq/my-robot --epochs 100
  openvla train-vq finetune.yaml vq/my-robot --num-codes 256    # the datasets of a configuration of openvla finetune

Losses and updates are those of VQ-BeT (Lee et al. 2024, "Behavior Generation with Latent Actions").
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from ..actions_openvla import NormalizationStatistics
from ..configuration_openvla import OpenVLAConfig, write_json
from ..conversion.torch_archive import load_torch_file
from ..conversion.vq_format import LEARNING_RATE, VQ_FILE, WEIGHT_DECAY, native_vq_config, read_vq
from ..data.doctor import check_statistics, raise_for_findings
from ..data.episodes import EpisodeReader, usable_episodes
from ..data.presets import AUTO
from ..data.remote import local_path
from ..data.utils import read_json
from ..dimension_labels import dimension_labels
from ..errors_openvla import OpenVLAValueError
from ..inference.policy import default_device
from ..vq_openvla import VQ_MODULE, ActionVQ
from .config import FinetuneConfig, read_yaml
from .datasets import Demonstrations

HIDDEN_DIM = 128  # of encoder and decoder
COMMITMENT_WEIGHT = 5.0
EMA_DECAY, EMA_EPSILON = 0.8, 1e-5  # of the codebooks' moving averages
RUN_FILE, REPORT_FILE = "training.json", "reconstruction.json"
FREE_OPTIONS = ("epochs", "save_epochs", "logging_steps")  # may differ when a run is continued
ENCODED_AT_ONCE = 4096  # chunks


@dataclass(frozen=True)
class VQTrainingConfig:
    """Options of ``openvla train-vq``; the defaults are openvla-mini's, with the chunk length of its published folders.

    Attributes:
        chunk_length: Actions per chunk.
        num_codes: Entries of a codebook.
        num_rounds: Rounds of quantisation, each of which is one action token; None is the number of action dimensions.
        latent_dim: Dimensions of the latent vector that is quantised.
        act_scale: Divides actions before they are encoded, and multiplies what is decoded.
        encoder_loss_multiplier: Weight of the reconstruction loss.
        batch_size: Chunks per optimizer step.
        epochs: Passes over the data; chunks that do not fill a batch are left out of an epoch.
        save_epochs: Epochs between two checkpoints.
        logging_steps: Optimizer steps between two lines of metrics; the last step of an epoch is always logged.
        seed: Seed of initial weights and of the order of the chunks.

    Raises:
        OpenVLAValueError: A number is not positive.
    """

    chunk_length: int = 8
    num_codes: int = 128
    num_rounds: int | None = None
    latent_dim: int = 512
    act_scale: float = 1.0
    encoder_loss_multiplier: float = 1.0
    batch_size: int = 1028
    epochs: int = 200
    save_epochs: int = 2
    logging_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "seed" and value is not None and not value > 0:
                raise OpenVLAValueError(f"{field.name} must be above 0, got {value}.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla train-vq``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", help="dataset folder, or a YAML file of openvla finetune, whose datasets are used")
    parser.add_argument("out", help="folder to write; a run that it holds is continued")
    parser.add_argument("--preset", metavar="NAME", help="fields of a known dataset (default: by its name), or none")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count episodes that cannot be used")
    parser.add_argument(
        "--accept", action="append", default=[], metavar="CHECK", help="continue despite this check's finding"
    )
    parser.add_argument("--device", help="cpu, cuda, ...; default cuda if available, else cpu")
    for field in fields(VQTrainingConfig):
        kind = float if isinstance(field.default, float) else int
        default = "the number of action dimensions" if field.default is None else field.default
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            metavar="N",
            help=f"default {default}",
        )


def run(args: argparse.Namespace) -> int:
    """Train, print the reconstruction error, and return the exit status."""
    config = VQTrainingConfig(**{field.name: getattr(args, field.name) for field in fields(VQTrainingConfig)})
    out = local_path(args.out)
    report = train_vq(open_data(args), out, config, args.device or default_device())
    print(format_report(report))
    return 0


def open_data(args: argparse.Namespace) -> Demonstrations:
    """Open the datasets of the options, and raise if a check is certain that one of them is wrong."""
    values: dict[str, Any] = {"data": args.data}
    if Path(args.data).suffix in (".yaml", ".yml"):
        names = ("data", "preset", "skip_bad", "accept")
        values = {name: value for name, value in read_yaml(Path(args.data)).items() if name in names}
    options = {"preset": args.preset, "skip_bad": args.skip_bad, "accept": args.accept}
    values |= {name: value for name, value in options.items() if value}
    data = Demonstrations(FinetuneConfig(model="", output_dir="", **{"preset": AUTO, **values}))
    raise_for_findings({**check_statistics(data.statistics), **data.findings}, data.config.accept, quiet=False)
    return data


def train_vq(
    data: Demonstrations, out: Path, config: VQTrainingConfig, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """Train a VQ autoencoder on the action chunks of datasets, from the newest checkpoint in ``out`` on.

    Args:
        data: The datasets; anything with their ``readers``, ``statistics`` and ``weights``.
        out: Folder to write.
        config: Sizes and options.
        device: Device to train on.

    Returns:
        The content of reconstruction.json, see ``measure_reconstruction``.

    Raises:
        OpenVLAValueError: The data has fewer chunks than a batch, ``out`` holds something else, or the loss is not
            finite.
    """
    chunks = ActionChunks(data.readers, data.statistics, data.weights, config.chunk_length)
    if len(chunks) < config.batch_size:
        raise OpenVLAValueError(
            f"The data has {len(chunks)} chunks, fewer than a batch of {config.batch_size}; set a smaller batch_size."
        )
    native = native_vq_config(
        action_dim=chunks.action_dim,
        chunk_length=config.chunk_length,
        latent_dim=config.latent_dim,
        num_codes=config.num_codes,
        num_rounds=config.num_rounds or chunks.action_dim,
        act_scale=config.act_scale,
        encoder_loss_multiplier=config.encoder_loss_multiplier,
    )
    record = {
        "config": asdict(config),
        "datasets": {
            name: {"weight": weight, "chunks": count}
            for name, weight, count in zip(chunks.names, data.weights, np.bincount(chunks.dataset_index).tolist())
        },
        "statistics": {name: data.statistics[name] for name in chunks.names},
    }
    require_same_run(out, record)
    (out / VQ_FILE).parent.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        trainer = VQTrainer(native)
    if (out / VQ_FILE).is_file():
        trainer.load_state_dict(load_torch_file(out / VQ_FILE))
    trainer.to(device)
    write_json(out / "config.json", native)
    write_json(out / RUN_FILE, record)
    _train(trainer, chunks, out, config)
    report = measure_reconstruction(out, chunks)
    write_json(out / REPORT_FILE, report)
    return report


def require_same_run(out: Path, record: Mapping[str, Any]) -> None:
    """Raise OpenVLAValueError if a folder holds another run, or something else than a run."""
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / RUN_FILE).is_file():
        raise OpenVLAValueError(f"{out} is not empty and holds no run of openvla train-vq; give another folder.")
    saved = json.loads(json.dumps(read_json(out / RUN_FILE)))
    for part, value in json.loads(json.dumps(record)).items():
        before = saved.get(part)
        if part == "config":
            before, value = ({k: v for k, v in each.items() if k not in FREE_OPTIONS} for each in (before, value))
        if before != value:
            differing = sorted(name for name in {*before, *value} if before.get(name) != value.get(name))
            raise OpenVLAValueError(
                f"{out} holds a run with another {part}: {differing} differ. Continue it with what is in {RUN_FILE}, "
                "or give another folder."
            )


class ActionChunks:
    """Normalised action chunks of all episodes of datasets, in memory.

    A chunk starts at every step of an episode. Past its end nothing moves: normalised actions are 0, and dimensions
    that are not normalised (the gripper) keep their last value, as in openvla-mini's training.

    Args:
        readers: The datasets.
        statistics: Their statistics by name.
        weights: Sampling weight of a step of each dataset, relative to those of the other ones.
        chunk_length: Actions per chunk.

    Attributes:
        names: Names of the datasets.
        statistics: Statistics of their actions.
        action_dim: Number of action dimensions.

    Raises:
        OpenVLAValueError: The datasets have different numbers of action dimensions.
    """

    def __init__(
        self,
        readers: Sequence[EpisodeReader],
        statistics: Mapping[str, Any],
        weights: Sequence[float],
        chunk_length: int,
    ) -> None:
        self.names, self.chunk_length = [reader.name for reader in readers], chunk_length
        self.statistics = [NormalizationStatistics(statistics[name]["action"], name) for name in self.names]
        dimensions = {one.name: one.dimension for one in self.statistics}
        if len(set(dimensions.values())) != 1:
            raise OpenVLAValueError(f"Datasets must have the same number of action dimensions, got {dimensions}.")
        self.action_dim = self.statistics[0].dimension
        rows: list[np.ndarray] = []
        is_padding: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        counts, offset = [], 0
        for reader, one in zip(readers, self.statistics):
            counts.append(0)
            for episode in usable_episodes(reader, []):
                padded = pad_end(one.normalize(episode.actions), ~one.mask, chunk_length - 1)
                rows.append(padded.astype(np.float32))
                is_padding.append(np.arange(len(padded)) >= len(episode))
                starts.append(offset + np.arange(len(episode)))
                counts[-1] += len(episode)
                offset += len(padded)
        self._rows, self._is_padding = torch.from_numpy(np.concatenate(rows)), np.concatenate(is_padding)
        self._starts, self.dataset_index = np.concatenate(starts), np.repeat(np.arange(len(counts)), counts)
        probabilities = np.array(weights, np.float64)[self.dataset_index]
        self._probabilities = probabilities / probabilities.sum() if len(set(weights)) > 1 else None

    def __len__(self) -> int:
        return len(self._starts)

    def take(self, indices: np.ndarray) -> torch.Tensor:
        """Return chunks by their numbers: float32 ``(len(indices), chunk_length, action_dim)``."""
        return self._rows[torch.from_numpy(self._row_numbers(indices))]

    def is_padding(self, indices: np.ndarray) -> np.ndarray:
        """Return which actions of chunks are past the end of their episodes: bool ``(len(indices), chunk_length)``."""
        return self._is_padding[self._row_numbers(indices)]

    def _row_numbers(self, indices: np.ndarray) -> np.ndarray:
        return self._starts[indices][:, None] + np.arange(self.chunk_length)

    def batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
        """Yield the full batches of an epoch: every chunk once, or by weight with repetition where weights differ."""
        generator, count = np.random.default_rng([seed, epoch]), len(self)
        if self._probabilities is None:
            order = generator.permutation(count)
        else:
            order = generator.choice(count, size=count, p=self._probabilities)
        for start in range(0, count - batch_size + 1, batch_size):
            yield self.take(order[start : start + batch_size])


def pad_end(actions: np.ndarray, is_absolute: np.ndarray, count: int) -> np.ndarray:
    """Append ``count`` actions that do nothing to normalised ones ``(steps, action_dim)``.

    Args:
        actions: Normalised actions.
        is_absolute: bool ``(action_dim,)``: dimensions that keep their last value; the others are 0.
        count: Number of actions to append.
    """
    return np.concatenate([actions, np.repeat(np.where(is_absolute, actions[-1:], 0.0), count, axis=0)])


class MLP(nn.Module):
    """Encoder or decoder; its parameters have openvla-mini's names."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        layers = nn.Linear(input_dim, HIDDEN_DIM), nn.Linear(HIDDEN_DIM, HIDDEN_DIM), nn.Linear(HIDDEN_DIM, output_dim)
        for layer in layers:
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.encoder = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU())
        self.fc = layers[2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.encoder(x))


class Codebook(nn.Module):
    """Codebook of one round, which follows the vectors that it quantises; its buffers have openvla-mini's names.

    ``embed`` is the moving average of the sums of the vectors of each code (``embed_avg``) by that of their numbers
    (``cluster_size``), the latter with Laplace smoothing.
    """

    embed: torch.Tensor  # (1, codes, latent), as the other two
    embed_avg: torch.Tensor
    cluster_size: torch.Tensor  # (1, codes)

    def __init__(self, num_codes: int, latent_dim: int) -> None:
        super().__init__()
        embed = nn.init.kaiming_uniform_(torch.empty(1, num_codes, latent_dim))
        self.register_buffer("initted", torch.ones(1))
        self.register_buffer("cluster_size", torch.zeros(1, num_codes))
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("embed", embed)

    @torch.no_grad()
    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the nearest entries of vectors ``(batch, latent)`` and their codes, and then update the entries."""
        codes = torch.cdist(vectors, self.embed[0]).argmin(-1)
        entries = self.embed[0][codes]
        num_codes = len(self.embed[0])
        one_hot = F.one_hot(codes, num_codes).to(vectors.dtype)
        self.cluster_size[0].lerp_(one_hot.sum(0), 1 - EMA_DECAY)
        self.embed_avg[0].lerp_(one_hot.T @ vectors, 1 - EMA_DECAY)
        total = self.cluster_size[0].sum()
        smoothed = (self.cluster_size[0] + EMA_EPSILON) / (total + num_codes * EMA_EPSILON) * total
        self.embed.copy_(self.embed_avg / smoothed[:, None])
        return entries, codes


class VQTrainer:
    """Encoder, decoder, codebooks and optimizer, with openvla-mini's update rule and state dict.

    Args:
        config: Content of config.json.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        size, latent = config["input_dim_h"] * config["input_dim_w"], config["n_latent_dims"]
        self.act_scale, self.l1_weight = config["act_scale"], config["encoder_loss_multiplier"]
        self.codebooks = [Codebook(config["vqvae_n_embed"], latent) for _ in range(config["vqvae_groups"])]
        layers = nn.ModuleList([nn.ModuleDict({"_codebook": codebook}) for codebook in self.codebooks])
        self.rounds = nn.ModuleDict({"layers": layers})  # names as in openvla-mini's state dict
        self.encoder, self.decoder = MLP(size, latent), MLP(latent, size)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    @property
    def step(self) -> int:
        """Return the number of optimizer steps so far."""
        return max((int(state["step"]) for state in self.optimizer.state_dict()["state"].values()), default=0)

    def to(self, device: str | torch.device) -> None:
        """Move everything to a device."""
        for module in (self.encoder, self.decoder, self.rounds):
            module.to(device)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # moves its state to its parameters' device

    def update(self, chunks: torch.Tensor) -> dict[str, torch.Tensor]:
        """Make an optimizer step, and update the codebooks.

        Gradients pass the quantisation as if it were the identity (straight-through), in each round: those of the
        reconstruction loss reach the encoder once for every round, as in VQ-BeT.

        Args:
            chunks: Normalised chunks, float32 ``(batch, chunk_length, action_dim)``.

        Returns:
            ``l1_loss``, ``commitment_loss`` (sum over rounds) and ``mse_loss`` of the chunks, scalars; and ``codes``,
            int64 ``(batch, rounds)``.
        """
        target = chunks.to(self.decoder.fc.weight.device).flatten(1) / self.act_scale
        residual = self.encoder(target)
        quantized, commitment_loss = torch.zeros_like(residual), residual.new_zeros(())
        codes = []
        for codebook in self.codebooks:
            entries, code = codebook(residual.detach())
            commitment_loss = commitment_loss + F.mse_loss(entries, residual)
            passed = residual + (entries - residual).detach()
            residual, quantized = residual - passed.detach(), quantized + passed
            codes.append(code)
        decoded = self.decoder(quantized)
        l1_loss = (target - decoded).abs().mean()
        self.optimizer.zero_grad()
        (l1_loss * self.l1_weight + commitment_loss * COMMITMENT_WEIGHT).backward()
        self.optimizer.step()
        losses = {"l1_loss": l1_loss, "commitment_loss": commitment_loss, "mse_loss": F.mse_loss(decoded, target)}
        return {**{name: loss.detach() for name, loss in losses.items()}, "codes": torch.stack(codes, dim=-1)}

    def state_dict(self) -> dict[str, Any]:
        """Return the content of model.pt."""
        return {
            "encoder": self.encoder.state_dict(),
            "decoder": self.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "vq_embedding": self.rounds.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the content of model.pt."""
        for name, module in (("encoder", self.encoder), ("decoder", self.decoder), ("vq_embedding", self.rounds)):
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])


def _train(trainer: VQTrainer, chunks: ActionChunks, out: Path, config: VQTrainingConfig) -> None:
    """Train until the last epoch, and save every ``save_epochs`` epochs."""
    steps_per_epoch = len(chunks) // config.batch_size
    epoch, step = divmod(trainer.step, steps_per_epoch)
    assert not step, "checkpoints are written at the end of an epoch"
    if epoch > config.epochs:
        raise OpenVLAValueError(f"{out} holds a run of {epoch} epochs, more than {config.epochs}; set as many or more.")
    progress = tqdm(total=config.epochs * steps_per_epoch, initial=trainer.step, desc="training", unit="step")
    step = trainer.step
    while epoch < config.epochs:
        for batch in chunks.batches(epoch, config.batch_size, config.seed):
            metrics = trainer.update(batch)
            step += 1
            progress.update()
            if step % config.logging_steps == 0 or step % steps_per_epoch == 0:
                _log(metrics, step, epoch, out, progress)
        epoch += 1
        if epoch % config.save_epochs == 0 or epoch == config.epochs:
            temporary = (out / VQ_FILE).with_name(".model.pt.partial")
            torch.save(trainer.state_dict(), temporary)
            os.replace(temporary, out / VQ_FILE)
    progress.close()


def _log(metrics: dict[str, torch.Tensor], step: int, epoch: int, out: Path, progress: tqdm) -> None:
    """Write a line of metrics; raise OpenVLAValueError if a loss is not finite."""
    codes = metrics.pop("codes")
    values = {name: float(value) for name, value in metrics.items()}
    if not np.isfinite(list(values.values())).all():
        raise OpenVLAValueError(f"The losses at step {step} are {values}; the data or act_scale is wrong.")
    values["codes_used"] = float(np.mean([len(column.unique()) for column in codes.T]))
    progress.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")


@torch.no_grad()
def measure_reconstruction(folder: Path, chunks: ActionChunks) -> dict[str, Any]:
    """Encode and decode all chunks with the autoencoder of a folder, as a converted model does.

    Returns:
        ``mean_absolute_error``: for each dataset, by dimension, in the dimension's unit, without actions past an
        episode's end (actions outside q01 to q99 count as clipped); ``units``; ``codes_used``: of each round;
        ``chunks``: their number.
    """
    saved = read_vq(folder)
    vq = ActionVQ(OpenVLAConfig(**saved.fields))
    vq.load_state_dict({name.removeprefix(f"{VQ_MODULE}."): tensor for name, tensor in saved.tensors.items()})
    sums = np.zeros((len(chunks.names), chunks.action_dim))
    counts = np.zeros(len(chunks.names))
    used = [set[int]() for _ in vq.codebooks]
    for start in range(0, len(chunks), ENCODED_AT_ONCE):
        indices = np.arange(start, min(start + ENCODED_AT_ONCE, len(chunks)))
        originals = chunks.take(indices)
        codes = vq.encode(originals)
        decoded, is_action = vq(codes).numpy(), ~chunks.is_padding(indices)
        for number, statistics in enumerate(chunks.statistics):
            rows = is_action & (chunks.dataset_index[indices] == number)[:, None]
            before, after = (statistics.unnormalize(each[rows]) for each in (originals.numpy(), decoded))
            sums[number] += np.abs(before - after).sum(axis=0)
            counts[number] += len(before)
        for codes_of_round, column in zip(used, codes.T):
            codes_of_round.update(column.unique().tolist())
    labels = [dimension_labels(chunks.action_dim, name) for name in chunks.names]
    return {
        "chunks": len(chunks),
        "num_codes": len(vq.codebooks[0]),
        "codes_used": [len(codes_of_round) for codes_of_round in used],
        "mean_absolute_error": {
            name: {label: value for (label, _), value in zip(labels[number], (sums / counts[:, None])[number].tolist())}
            for number, name in enumerate(chunks.names)
        },
        "units": {name: [unit for _, unit in labels[number]] for number, name in enumerate(chunks.names)},
    }


def format_report(report: Mapping[str, Any]) -> str:
    """Return the content of reconstruction.json as a table."""
    lines = [f"{report['chunks']} chunks; codes used of {report['num_codes']}, by round: {report['codes_used']}"]
    for name, errors in report["mean_absolute_error"].items():
        lines.append(f"{name}: mean absolute error of reconstructed actions")
        lines += [
            f"  {label:<12} {error:.5f} {unit}" for (label, error), unit in zip(errors.items(), report["units"][name])
        ]
    return "\n".join(lines)
