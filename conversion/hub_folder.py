"""A checkpoint's folder beside its weights: configuration, code, card, manifest; how it appears whole or not at all."""

from __future__ import annotations

import glob
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from transformers import GenerationConfig

from ..configuration_openvla import PrismaticConfig, write_json
from ..loading import MODEL_CLASSES
from ..modeling_openvla import STATISTICS_FILE
from ..publishing_openvla import mark_code
from .hub_upload import CARD_FILE, model_card
from .prismatic_format import read_json
from .safetensors_io import digest_file, weight_files

MANIFEST_FILE = "openvla_manifest.json"
GENERATION_FILE = "generation_config.json"


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
    for code in sorted(Path(__file__).parents[1].glob("*_openvla.py")):
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
