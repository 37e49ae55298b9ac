"""A checkpoint's folder beside its weights: configuration, code, card, manifest; how it appears whole or not at all."""

from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from transformers import GenerationConfig

from .checkpoint_files import digest_file, require_equal, weight_files
from .configuration_openvla import PrismaticConfig, write_json
from .loading import MODEL_CLASSES
from .modeling_openvla import STATISTICS_FILE
from .native_checkpoint import read_json
from .publishing_openvla import CARD_FILE, model_card
from .saved_folder_openvla import mark_code

MANIFEST_FILE = "openvla_manifest.json"
GENERATION_FILE = "generation_config.json"


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``openvla verify``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that openvla convert wrote")


def run_verify(args: argparse.Namespace) -> int:
    """Check every file and tensor; returns the exit status."""
    print(f"{args.folder}: {verify(args.folder)} tensors and all files are as they were written")
    return 0


def verify(folder: str | os.PathLike) -> int:
    """Check a converted folder against its manifest.

    Returns:
        The number of tensors.

    Raises:
        ValueError: Files or tensors differ from what was written; all are named.
        FileNotFoundError: There is no manifest.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST_FILE}; only folders that openvla convert wrote have one.")
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    wrong = [file for file in manifest["files"] if not (folder / file).is_file()]
    wrong += [f for f, sha in manifest["files"].items() if f not in wrong and digest_file(folder / f) != sha]
    if wrong:
        raise ValueError(f"{folder} is not what was written: {sorted(wrong)} changed or missing.")
    require_equal(weight_files(folder), manifest["tensors"])
    return len(manifest["tensors"])


def write_surroundings(folder: Path, config: PrismaticConfig) -> None:
    """Write everything but weights, processor and card: configuration, code, statistics.

    A generation_config.json that is there already stays.
    """
    config.architectures = [MODEL_CLASSES[config.model_type].__name__]
    config.save_pretrained(folder)
    text = config.text_config
    if not (folder / GENERATION_FILE).is_file():
        GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=config.pad_token_id
        ).save_pretrained(folder)
    for code in sorted(Path(__file__).parent.glob("*_openvla.py")):
        shutil.copy(code, folder / code.name)
    mark_code(folder)
    if getattr(config, "norm_stats", None):
        write_json(folder / STATISTICS_FILE, config.norm_stats)


def write_card(folder: Path, name: str) -> None:
    """The model card, of what config.json says."""
    (folder / CARD_FILE).write_text(model_card(read_json(folder / "config.json"), name), encoding="utf-8")


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    weights = {path.name for path in weight_files(folder).values()}
    others = sorted(path for path in folder.iterdir() if path.name not in {*weights, CARD_FILE})  # cards are edited
    files = {path.name: digest_file(path) for path in others}
    write_json(folder / MANIFEST_FILE, {"files": files, "tensors": dict(digests)})


@contextmanager
def appearing_whole(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its name only when the block ends well; else it is removed.

    What a killed run left beside the target is cleared away first, and what it had moved aside comes back.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_after_killed_runs(target)
    host = _hidden_prefix(target)
    folder, previous = (target.parent / f"{host}{os.getpid()}.{kind}" for kind in ("partial", "previous"))
    folder.mkdir()
    try:
        yield folder
        if target.exists():
            os.replace(target, previous)
        try:
            os.replace(folder, target)
        except OSError:
            if previous.exists():
                os.replace(previous, target)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _hidden_prefix(target: Path) -> str:
    return f".{target.name}.{platform.node()}."


def clear_after_killed_runs(target: Path) -> None:
    """Put back what a killed run had moved aside, and remove what it had written beside the target.

    Only of processes that ran on this machine and are gone.
    """
    host = _hidden_prefix(target)
    for left in target.parent.glob(f"{glob.escape(host)}*"):
        pid, _, kind = left.name.removeprefix(host).partition(".")
        if not pid.isdigit() or psutil.pid_exists(int(pid)) and int(pid) != os.getpid():
            continue
        if kind == "previous" and not target.exists():
            os.replace(left, target)
        elif kind in ("partial", "previous"):
            shutil.rmtree(left)
