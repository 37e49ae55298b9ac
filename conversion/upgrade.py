"""``openvla upgrade``: give a saved folder today's code and configuration; its weights are not changed.

A folder holds the code that it was saved with. Published folders hold code for transformers 4.40.1; folders of an
older openvla hold code that a newer transformers may break. This replaces that code, rewrites config.json and the
processor's files for every supported transformers, adds README.md and openvla_manifest.json where they are missing, and
keeps the rest: weights (linked, not copied), tokenizer, statistics, your own files. Whole models, 8- and 4-bit models
and adapters (LoRA) alike. With OUT, hidden files stay behind; from a Hub id, only the model's files are fetched.

pytorch_model.bin, OpenVLA-OFT's part files and native runs need other weights files: openvla convert makes them.

Examples:
  openvla upgrade my-openvla upgraded
  openvla upgrade my-openvla --in-place
  openvla upgrade someone/openvla-7b-finetuned upgraded
  openvla upgrade me/openvla-7b-my-robot upgraded --publish
  openvla upgrade someone/openvla-7b-finetuned upgraded --create-pr
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

from ..adapters.files import ADAPTER_WEIGHTS_FILE, read_adapter
from ..configuration_openvla import ADAPTER_CONFIG_FILE
from ..errors_openvla import OpenVLAFileExistsError, OpenVLAFileNotFoundError, OpenVLAValueError
from .console import printed_logs
from .detect import NATIVE_RUN, detect_layout
from .download import local_folder
from .files import atomic_directory, clean_up_interrupted_runs, link_or_copy, read_json
from .hub_folder import (
    GENERATION_FILE,
    MANIFEST_FILE,
    current_config,
    require_matching_shapes,
    write_card,
    write_config_and_code,
    write_manifest,
)
from .hub_upload import CARD_FILE
from .hub_weights import has_safetensors, link_weights, weight_files
from .oft_format import part_files
from .processor_files import has_tokenizer, write_processor
from .publish import publish
from .safetensors_io import require_digests, tensor_shapes
from .tracevla_format import with_trace_prompting

logger = logging.getLogger(__name__)

CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
# Code files that saved folders carry: the published code's and ours, with the names that are no longer shipped. Add a
# name here when a shipped file is renamed or dropped.
OLD_CODE = {f"{part}_prismatic.py" for part in ("configuration", "modeling", "processing")}
OLD_CODE |= {f"{part}_openvla.py" for part in ("answers", "fast", "graphs", "own_functions")}
OLD_CODE |= {path.name for path in Path(__file__).parents[1].glob("*_openvla.py")}
OLD_CODE |= {
    f"{part}_openvla.py"
    for part in ("adapter_files", "adapters", "device_images", "jpeg", "norm_stats", "prompts", "saved_folder")
}
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")
# Temporary names under which this package and huggingface_hub write before they rename.
TEMPORARY_FILE = re.compile(r"\..*\.\d+\.tmp|.*\.incomplete")
COMMIT_HASH = re.compile(r"[0-9a-f]{40}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla upgrade``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="DIR_OR_ID", help="saved folder, or Hub id")
    parser.add_argument(
        "target", metavar="OUT", type=Path, nargs="?", help="folder to write; must not exist without --overwrite"
    )
    parser.add_argument(
        "--in-place", action="store_true", help="instead of OUT: replace the folder itself, completely or not at all"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, if it is a saved folder")
    parser.add_argument("--revision", help="for a Hub id: branch, tag or commit (default main)")
    parser.add_argument("--token", help="for a Hub id: access token (default that of `hf auth login`, or $HF_TOKEN)")
    parser.add_argument(
        "--publish", action="store_true", help="for a Hub id: also commit OUT to its repository, on --revision's branch"
    )
    parser.add_argument("--create-pr", action="store_true", help="for a Hub id: open a pull request with OUT")


def run(args: argparse.Namespace) -> int:
    """Upgrade, publish with --publish or --create-pr, print the progress, and return the exit status."""
    pushes = args.publish or args.create_pr
    if pushes and (Path(args.source).exists() or args.source.count("/") != 1):
        raise OpenVLAValueError(
            f"--publish and --create-pr need a Hub id (organization/name), got {args.source}; for a folder run "
            "openvla publish OUT REPO_ID afterwards."
        )
    if pushes and args.revision and (args.create_pr or COMMIT_HASH.fullmatch(args.revision)):
        raise OpenVLAValueError(
            "--publish needs a branch as --revision, and --create-pr takes none (it goes to main); got "
            f"{args.revision}. Leave out what does not fit, or run openvla publish OUT REPO_ID afterwards."
        )
    with printed_logs():
        removed = upgrade(
            args.source,
            args.target,
            in_place=args.in_place,
            overwrite=args.overwrite,
            revision=args.revision,
            token=args.token,
        )
        if pushes:
            publish(
                args.target,
                args.source,
                create_pr=args.create_pr,
                branch=args.revision,
                message="Upgrade code and configuration",
                token=args.token,
                remove=removed,
            )
    return 0


def upgrade(
    source: str | os.PathLike,
    target: str | os.PathLike | None = None,
    *,
    in_place: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> list[str]:
    """Write a saved folder again with today's code and configuration.

    The target appears, or replaces the source, in one step when it is complete. On any error source and target stay
    as they were.

    Args:
        source: Folder, or Hub id ("organization/name", or "organization/name/folder").
        target: Folder to write; None with ``in_place``.
        in_place: Replace the source folder.
        overwrite: Replace an existing target.
        revision: Branch, tag or commit of a Hub id; None is main.
        token: Access token for a Hub id; None takes the one of ``hf auth login``.

    Returns:
        Names of the source's code files that were removed.

    Raises:
        ValueError: The source is no saved model of this family, is damaged, is being written, or needs ``convert``;
            or ``target`` and ``in_place`` contradict each other.
        FileNotFoundError: There is no source, or no config.json in it.
        FileExistsError: The target exists and ``overwrite`` is False.
        OSError: The disk is full.
    """
    if in_place == (target is not None):
        raise OpenVLAValueError("An upgrade needs OUT, the folder to write, or --in-place; give one of them.")
    if os.path.lexists(Path(source).parent):
        clean_up_interrupted_runs(Path(os.path.abspath(source)))
    if in_place and not Path(source).is_dir():
        raise OpenVLAValueError(f"--in-place is for a folder; {source} is none. Give OUT.")
    folder = local_folder(source, revision=revision, token=token)
    if not folder.is_dir():
        raise OpenVLAValueError(f"{source} is a file; give the folder that it lies in.")
    if target is None:
        folder = folder.resolve()
    target = folder if target is None else Path(target)
    try:
        changes, removed = _upgrade_folder(folder, target, in_place, overwrite)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(f"No space left on the disk of {target}; nothing was changed.") from error
    changes += [f"removed {name}" for name in removed]
    logger.info(f"{source}: {'; '.join(changes) or 'current already'}")
    logger.info(f"{target}: complete, weights as they were")
    if in_place and Path(os.path.abspath(source)) == Path(os.environ.get("PWD", "")):
        logger.info(f"This folder was replaced while your shell is in it; enter it again: cd {target}")
    return removed


def _upgrade_folder(folder: Path, target: Path, in_place: bool, overwrite: bool) -> tuple[list[str], list[str]]:
    """Write the upgraded folder; return the changes in words and the names of the code files that were removed."""
    if not in_place:
        _require_writable(target, folder, overwrite)
    _require_upgradable(folder)
    before = _snapshot(folder)
    old_code = sorted(name for name in OLD_CODE if (folder / name).is_file())
    with atomic_directory(target) as new:
        _write_upgraded(folder, new, target.name)
        _copy_other_files(folder, new, {MANIFEST_FILE, *old_code}, in_place)
        if in_place:
            _copy_modes_and_owners(folder, new)
        changes = _describe_changes(folder, new)
        changed_meanwhile = dict(set(_snapshot(folder).items()) ^ set(before.items()))
        if changed_meanwhile:
            raise OpenVLAValueError(_being_written(folder, min(changed_meanwhile)))
        if not in_place:
            _require_writable(target, folder, overwrite)
    return changes, [name for name in old_code if not (target / name).is_file()]


def _require_writable(target: Path, folder: Path, overwrite: bool) -> None:
    """Raise if the target must not be written or replaced."""
    source_path, target_path = folder.resolve(), Path(os.path.realpath(target))
    if source_path == target_path or source_path in target_path.parents or target_path in source_path.parents:
        raise OpenVLAValueError(f"OUT ({target}) must lie beside {folder}, not in it or around it; or use --in-place.")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OpenVLAFileExistsError(f"{target} exists; give another name, or --overwrite to replace it.")
    if not (target / "config.json").is_file():
        raise OpenVLAFileExistsError(f"{target} is no saved folder (no config.json) and is kept; give another name.")


def _require_upgradable(folder: Path) -> None:
    """Raise if a folder cannot be upgraded as it is; the message says what to do."""
    temporary = sorted(path.name for path in folder.iterdir() if TEMPORARY_FILE.fullmatch(path.name))
    if temporary:
        raise OpenVLAValueError(_being_written(folder, temporary[0]))
    if _is_adapter(folder) and not (folder / "config.json").is_file():
        raise OpenVLAFileNotFoundError(
            f"{folder} is an adapter of peft alone: it has no config.json and no code to upgrade."
        )
    read_json(folder / "config.json")
    layout = detect_layout(folder)
    needs_convert = None
    if layout == NATIVE_RUN:
        needs_convert = "is a native run"
    elif part_files(folder):
        needs_convert = f"holds OpenVLA-OFT's part files ({', '.join(p.name for p in part_files(folder).values())})"
    elif not _is_adapter(folder) and not has_safetensors(folder):
        needs_convert = "holds pytorch_model.bin, which upgrade would have to rewrite"
    if needs_convert:
        raise OpenVLAValueError(f"{folder} {needs_convert}; make a folder of it with: openvla convert {folder} OUT.")


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG_FILE).is_file()


def _write_upgraded(source: Path, folder: Path, name: str) -> None:
    """Write configuration, code and processor anew, and link the weights.

    Args:
        source: The folder to upgrade.
        folder: The new folder.
        name: The model's name, for a new model card.
    """
    fields = read_json(source / "config.json")
    files = {} if _is_adapter(source) else weight_files(source)
    config = current_config(source, with_trace_prompting(fields, files))
    if (source / "preprocessor_config.json").is_file() and has_tokenizer(source):
        write_processor(source, folder, config)
    if _is_adapter(source):
        read_adapter(source)  # raises if it is damaged
        link_or_copy(source / ADAPTER_WEIGHTS_FILE, folder / ADAPTER_WEIGHTS_FILE)
        write_config_and_code(folder, config)
        if not (source / GENERATION_FILE).is_file():
            (folder / GENERATION_FILE).unlink()  # an adapter uses its base's
        return
    if "quantization_config" not in fields:  # packed weights have shapes of their own
        require_matching_shapes(tensor_shapes(files), config, source)
    digests = link_weights(source, folder, files)
    if (source / MANIFEST_FILE).is_file():
        try:
            require_digests(files, read_json(source / MANIFEST_FILE)["tensors"])
        except ValueError as error:
            raise OpenVLAValueError(
                f"{str(error).rstrip('.')}; if the weights were changed on purpose, delete {MANIFEST_FILE} and run it "
                "again."
            ) from error
    if (source / GENERATION_FILE).is_file():
        shutil.copy(source / GENERATION_FILE, folder / GENERATION_FILE)
    write_config_and_code(folder, config)
    write_manifest(folder, digests)
    if not (source / CARD_FILE).is_file():
        write_card(folder, name)


def _copy_other_files(source: Path, folder: Path, excluded: set[str], in_place: bool) -> None:
    """Copy, or link, the files that the upgrade does not replace.

    Args:
        source: The folder to upgrade.
        folder: The new folder.
        excluded: Names of files that are not copied.
        in_place: Whether the new folder replaces the source: then all files are linked, hidden ones too; else weights
            are linked, other files are copied, and hidden ones are left out.
    """

    def copy(old: str | os.PathLike, new: str | os.PathLike) -> None:
        if in_place or str(old).endswith(WEIGHT_SUFFIXES):
            link_or_copy(old, new)
        else:
            shutil.copy2(old, new)

    for path in sorted(source.iterdir()):
        new = folder / path.name
        is_left_out = path.name.startswith(".") and not in_place
        if path.name in excluded or is_left_out or os.path.lexists(new):
            continue
        if path.is_symlink() and (in_place or not path.exists()):
            new.symlink_to(os.readlink(path))
        elif path.is_symlink() and path.is_dir():
            new.symlink_to(path.resolve())
        elif path.is_dir():
            shutil.copytree(path, new, copy_function=copy, symlinks=True)
        else:
            copy(path, new)


def _copy_modes_and_owners(source: Path, folder: Path) -> None:
    """Give the new folder and its files the modes and owners of those that they replace."""
    for path in [folder, *folder.iterdir()]:
        old = source / path.relative_to(folder)
        status = (old if os.path.lexists(old) else source).lstat()
        if path.is_symlink():
            continue
        if old.exists():
            os.chmod(path, stat.S_IMODE(status.st_mode))
        if (status.st_uid, status.st_gid) != (path.stat().st_uid, path.stat().st_gid):
            with contextlib.suppress(PermissionError):  # only root may change a file's owner
                os.chown(path, status.st_uid, status.st_gid)


def _snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and modification time (ns) of every file, which show whether another process writes the folder."""
    files = {}
    for directory, _, names in os.walk(folder):
        for name in names:
            path = Path(directory, name)
            files[str(path.relative_to(folder))] = (path.lstat().st_size, path.lstat().st_mtime_ns)
    return files


def _being_written(folder: Path, name: str) -> str:
    return (
        f"{folder} is being written ({name}); nothing was changed. Run it again when the folder is complete, or delete "
        "that file if nothing writes it."
    )


def _describe_changes(source: Path, folder: Path) -> list[str]:
    """Return in words what is new: code files, fields of the JSON files, added files."""
    changes = []
    code = [path.name for path in sorted(folder.glob("*_openvla.py")) if not _is_same(source / path.name, path)]
    if code:
        changes.append(f"{len(code)} new code files")
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            old: dict[str, Any] = read_json(source / name) if (source / name).is_file() else {}
            new = json.loads((folder / name).read_text(encoding="utf-8"))
            fields = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            if fields:
                changes.append(f"{name}: {', '.join(fields)}")
    added = {path.name for path in folder.iterdir()} - {path.name for path in source.iterdir()} - set(code)
    return [*changes, f"added {', '.join(sorted(added))}"] if added else changes


def _is_same(first: Path, second: Path) -> bool:
    return first.is_file() and first.read_bytes() == second.read_bytes()
