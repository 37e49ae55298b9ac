"""``openvla inspect-data``: summarise a dataset as a table, JSON or a figure, check its numbers, or measure its loader.

The statistics of a large dataset may be computed in shards, on several machines, and merged. For a run's YAML file, a
plan says what each dataset of its mixture contributes and how many cores the loader needs.

For a checkpoint or a file of statistics, the statistics are checked. The exit status is 0 whatever the checks find;
``openvla finetune`` stops at certain findings, and the ``findings`` of the JSON have a ``severity``.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from ..data import inspect
from ..data.episodes import EpisodeReader
from ..data.open import open_dataset
from ..data.presets import AUTO
from ..data.statistics import cache_file
from ..data.statistics_shards import merge_statistics, write_statistics_shard
from ..errors_openvla import OpenVLAValueError
from .data_rate import data_rates
from .plan import GPU_RATE, describe_plan, mixture_plan, read_plan_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla inspect-data``."""
    inspect.add_arguments(parser)
    parser.add_argument(
        "--rate",
        action="store_true",
        help="measure instead how many samples a second the loader gives, on this machine",
    )
    parser.add_argument("--workers", type=int, nargs="+", metavar="N", help="with --rate: numbers of loader workers")
    parser.add_argument(
        "--statistics-shard",
        nargs=2,
        metavar=("K/N", "NPZ"),
        help="read the numbers of part K of N of the episodes, and write them to a file for --merge-statistics",
    )
    parser.add_argument(
        "--merge-statistics",
        nargs="+",
        type=Path,
        metavar="NPZ",
        help="compute the dataset's statistics from the files of all parts, for finetune on this machine",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="DIR is a YAML file of openvla finetune: what its data contributes, and the cores that the loader needs",
    )
    parser.add_argument(
        "--gpu-rate", type=float, metavar="X", help=f"with --plan: samples a second of a GPU (default {GPU_RATE:g})"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="with --plan: number of GPUs (default 1)")


def run(args: argparse.Namespace) -> int:
    """Inspect a dataset or statistics, or do what an option says instead; return the exit status."""
    tasks = {
        "rate": _report_rates,
        "statistics_shard": _write_shard,
        "merge_statistics": _merge_shards,
        "plan": _report_plan,
    }
    chosen = [name for name in tasks if getattr(args, name)]
    if args.workers and not args.rate:
        raise OpenVLAValueError("--workers is for --rate.")
    if (args.gpu_rate is not None or args.gpus is not None) and not args.plan:
        raise OpenVLAValueError("--gpu-rate and --gpus are for --plan.")
    if len(chosen) > 1 or chosen and (args.out or args.check_images):
        options = ", ".join(f"--{name.replace('_', '-')}" for name in tasks)
        raise OpenVLAValueError(f"Of {options} give one, without --out and --check-images.")
    return tasks[chosen[0]](args) if chosen else inspect.run(args)


def _open(args: argparse.Namespace) -> EpisodeReader:
    fields = inspect.parse_fields(args.fields)
    return open_dataset(args.data, preset=args.preset, fields=fields, split=args.split)


def _write_shard(args: argparse.Namespace) -> int:
    shard, file = args.statistics_shard
    numbers = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not numbers:
        raise OpenVLAValueError(f"--statistics-shard takes K/N and a file, such as 3/8 part3.npz; got {shard!r}.")
    number, total = map(int, numbers.groups())
    options = {"skip_bad": args.skip_bad, "progress": not args.json}
    counts = write_statistics_shard(_open(args), file, number, total, **options)
    if args.json:
        print(json.dumps({"file": file, **counts}))
    else:
        print(f"{file}: {counts['episodes']} episodes, {counts['steps']} steps, {counts['skipped']} skipped")
    return 0


def _merge_shards(args: argparse.Namespace) -> int:
    reader = _open(args)
    statistics = merge_statistics(reader, args.merge_statistics, skip_bad=args.skip_bad)
    if args.json:
        print(json.dumps({"name": reader.name, "statistics": statistics}))
    else:
        print(
            f"{reader.name}: {statistics['num_trajectories']} episodes, {statistics['num_transitions']} steps, "
            f"{statistics['num_skipped']} skipped; cached in {cache_file(reader)}"
        )
    return 0


def _report_plan(args: argparse.Namespace) -> int:
    given = [name for name in ("fields", "skip_bad") if getattr(args, name)]
    if given or args.preset != AUTO or args.split != "train":
        raise OpenVLAValueError("--plan takes preset, fields, split and skip_bad from the YAML file, not as options.")
    config = read_plan_config(Path(args.data))
    gpu_rate = GPU_RATE if args.gpu_rate is None else args.gpu_rate
    plan = mixture_plan(config, gpu_rate=gpu_rate, num_gpus=1 if args.gpus is None else args.gpus)
    print(json.dumps(plan) if args.json else describe_plan(plan))
    return 0


def _report_rates(args: argparse.Namespace) -> int:
    reader = _open(args)
    rates = data_rates(reader, args.workers or (), skip_bad=args.skip_bad)
    if args.json:
        print(json.dumps({"name": reader.name, "rates": rates}))
        return 0
    print(
        f"{reader.name} ({reader.format}): samples a second from storage to batch, {len(reader.fields.cameras)} images"
    )
    for rate in rates:
        workers = f"{rate['workers']} workers" if rate["workers"] else "main process"
        cpu = f", {rate['cpu_ms']} ms of processor time each" if "cpu_ms" in rate else ""
        augmented = "with augmentation" if rate["augment"] else "without augmentation"
        print(f"  {rate['samples_per_second']:>8.1f}  {augmented}, {workers}{cpu}")
    return 0
