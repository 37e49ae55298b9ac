"""``openvla inspect-data``: summarise a dataset as a table, JSON or a figure, check its numbers, or measure its loader.

For a checkpoint or a file of statistics, the statistics are checked. The exit status is 0 whatever the checks find;
``openvla finetune`` stops at certain findings, and the ``findings`` of the JSON have a ``severity``.
"""

from __future__ import annotations

import argparse
import json

from ..data import inspect
from ..data.open import open_dataset
from ..errors_openvla import OpenVLAValueError
from .data_rate import data_rates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla inspect-data``."""
    inspect.add_arguments(parser)
    parser.add_argument(
        "--rate",
        action="store_true",
        help="measure instead how many samples a second the loader gives, on this machine",
    )
    parser.add_argument("--workers", type=int, nargs="+", metavar="N", help="with --rate: numbers of loader workers")


def run(args: argparse.Namespace) -> int:
    """Inspect a dataset or statistics, or measure the loader, and return the exit status."""
    if args.workers and not args.rate or args.rate and (args.out or args.check_images):
        raise OpenVLAValueError("--workers is for --rate, which takes no --out and no --check-images.")
    return _report_rates(args) if args.rate else inspect.run(args)


def _report_rates(args: argparse.Namespace) -> int:
    fields = inspect.parse_fields(args.fields)
    reader = open_dataset(args.data, preset=args.preset, fields=fields, split=args.split)
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
