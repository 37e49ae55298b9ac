"""``openvla upgrade``: give a saved folder today's code and configuration; its weights stay as they are.

A folder carries the code that it was saved with. Published folders carry code for transformers 4.40.1; folders of an
older openvla carry code that a newer transformers may break. This replaces that code, rewrites config.json and the
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
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any

from ..adapters.files import ADAPTER_WEIGHTS_FILE, read_adapter
from ..errors_openvla import OpenVLAFileExistsError, OpenVLAFileNotFoundError, OpenVLAValueError
from ..publishing_openvla import ADAPTER_CONFIG_FILE
from .convert import (
    TOKENIZER_FILES,
    current_config,
    kind_of,
    link_or_copy,
    link_weights,
    require_fit,
    write_processor,
)
from .download import local_folder
from .hub_folder import (
    GENERATION_FILE,
    MANIFEST_FILE,
    appearing_whole,
    clear_after_killed_runs,
    write_card,
    write_manifest,
    write_surroundings,
)
from .hub_upload import CARD_FILE
from .oft_format import part_files
from .prismatic_format import read_json
from .publish import publish
from .safetensors_io import has_safetensors, require_equal, shapes, weight_files

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
WEIGHTS = (".safetensors", ".safetensors.index.json")
# Temporary names under which this package and huggingface_hub write before they rename.
TEMPORARY = re.compile(r"\..*\.\d+\.tmp|.*\.incomplete")
COMMIT = re.compile(r"[0-9a-f]{40}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla upgrade``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="DIR_OR_ID", help="saved folder, or Hub id")
    parser.add_argument(
        "target", metavar="OUT", type=Path, nargs="?", help="folder to write; must not exist without --overwrite"
    )
    parser.add_argument(
        "--in-place", action="store_true", help="in place of OUT: replace the folder itself, at once or not at all"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, if it is a saved folder")
    parser.add_argument("--revision", help="of a Hub id: branch, tag or commit (default main)")
    parser.add_argument("--token", help="of a Hub id: access token (default that of `hf auth login`, or $HF_TOKEN)")
    parser.add_argument(
        "--publish", action="store_true", help="of a Hub id: also commit OUT to its repository, on --revision's branch"
    )
    parser.add_argument("--create-pr", action="store_true", help="of a Hub id: open a pull request with OUT")


def run(args: argparse.Namespace) -> int:
    """Upgrade, report, and publish where asked; return the exit status."""
    pushes = args.publish or args.create_pr
    if pushes and (Path(args.source).exists() or args.source.count("/") != 1):
        raise OpenVLAValueError(
            f"--publish and --create-pr need a Hub id (organization/name), got {args.source}; for a folder run "
            "openvla publish OUT REPO_ID afterwards."
        )
    if pushes and args.revision and (args.create_pr or COMMIT.fullmatch(args.revision)):
        raise OpenVLAValueError(
            "--publish needs a branch as --revision, and --create-pr takes none (it goes to main); got "
            f"{args.revision}. Leave out what does not fit, or run openvla publish OUT REPO_ID afterwards."
        )
    removed = upgrade(
        args.source,
        args.target,
        in_place=args.in_place,
        overwrite=args.overwrite,
        revision=args.revision,
        token=args.token,
    )
    if not pushes:
        return 0
    return publish(
        args.target,
        args.source,
        create_pr=args.create_pr,
        branch=args.revision,
        message="Upgrade code and configuration",
        token=args.token,
        remove=removed,
    )


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

    The target appears, or replaces the source, in one step when it is complete. On any error source and target are as
    they were.

    Args:
        source: Folder, or Hub id ("organization/name", or "organization/name/folder").
        target: Folder to write; None with ``in_place``.
        in_place: Replace the source folder.
        overwrite: Replace an existing target.
        revision: Of a Hub id: branch, tag or commit; None is main.
        token: Of a Hub id: access token; None takes the one of ``hf auth login``.

    Returns:
        Names of the code files of the source that are gone.

    Raises:
        ValueError: The source is no saved model of this family, is damaged, is being written, or needs ``convert``;
            or ``target`` and ``in_place`` contradict each other.
        FileNotFoundError: There is no source, or no config.json in it.
        FileExistsError: The target exists, and ``overwrite`` is not given.
        OSError: The disk is full.
    """
    if in_place == (target is not None):
        raise OpenVLAValueError("An upgrade needs OUT, the folder to write, or --in-place; give one of them.")
    if os.path.lexists(Path(source).parent):
        clear_after_killed_runs(Path(os.path.abspath(source)))
    if in_place and not Path(source).is_dir():
        raise OpenVLAValueError(f"--in-place is for a folder; {source} is none. Give OUT.")
    folder = local_folder(source, revision=revision, token=token)
    if not folder.is_dir():
        raise OpenVLAValueError(f"{source} is a file; give the folder that it lies in.")
    if in_place:
        folder = folder.resolve()
    target = folder if in_place else Path(target)
    if not in_place:
        _require_writable(target, folder, overwrite)
    _require_upgradable(folder)
    before = _state(folder)
    old_code = sorted(name for name in OLD_CODE if (folder / name).is_file())
    try:
        with appearing_whole(target) as new:
            _write(folder, new, target.name)
            _carry_over(folder, new, {MANIFEST_FILE, *old_code}, everything=in_place)
            if in_place:
                _keep_owners(folder, new)
            changed = _differences(folder, new)
            written = dict(set(_state(folder).items()) ^ set(before.items()))
            if written:
                raise OpenVLAValueError(_being_written(folder, min(written)))
            if not in_place:
                _require_writable(target, folder, overwrite)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(f"No space left on the disk of {target}; nothing was changed.") from error
    removed = [name for name in old_code if not (target / name).is_file()]
    print(f"{source}: {'; '.join(changed + [f'removed {name}' for name in removed]) or 'current already'}")
    print(f"{target}: complete, weights as they were")
    if in_place and Path(os.path.abspath(source)) == Path(os.environ.get("PWD", "")):
        print(f"This folder was replaced while your shell is in it; go there again: cd {target}")
    return removed


def _require_writable(target: Path, folder: Path, overwrite: bool) -> None:
    """Raise where OUT may not be written, or replaced."""
    here, there = folder.resolve(), Path(os.path.realpath(target))
    if here == there or here in there.parents or there in here.parents:
        raise OpenVLAValueError(f"OUT ({target}) must lie beside {folder}, not in it or around it; or use --in-place.")
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OpenVLAFileExistsError(f"{target} exists; give another name, or --overwrite to replace it.")
    if not (target / "config.json").is_file():
        raise OpenVLAFileExistsError(f"{target} is no saved folder (no config.json) and is kept; give another name.")


def _require_upgradable(folder: Path) -> None:
    """Raise where a folder cannot be upgraded as it is; the message says what to do."""
    temporary = sorted(path.name for path in folder.iterdir() if TEMPORARY.fullmatch(path.name))
    if temporary:
        raise OpenVLAValueError(_being_written(folder, temporary[0]))
    if _is_adapter(folder) and not (folder / "config.json").is_file():
        raise OpenVLAFileNotFoundError(
            f"{folder} is an adapter of peft alone: it has no config.json and no code to upgrade."
        )
    read_json(folder / "config.json")
    kind = kind_of(folder)
    needs_convert = None
    if kind == "native run":
        needs_convert = "is a native run"
    elif part_files(folder):
        needs_convert = f"holds OpenVLA-OFT's part files ({', '.join(p.name for p in part_files(folder).values())})"
    elif not _is_adapter(folder) and not has_safetensors(folder):
        needs_convert = "holds pytorch_model.bin, which upgrade would have to rewrite"
    if needs_convert:
        raise OpenVLAValueError(f"{folder} {needs_convert}; make a folder of it with: openvla convert {folder} OUT.")


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG_FILE).is_file()


def _write(source: Path, folder: Path, name: str) -> None:
    """Write what is new: configuration, code, processor; link the weights."""
    fields = read_json(source / "config.json")
    config = current_config(source, fields)
    if (source / "preprocessor_config.json").is_file() and any((source / file).is_file() for file in TOKENIZER_FILES):
        write_processor(source, folder, config)
    if _is_adapter(source):
        read_adapter(source)  # raises where it is damaged
        link_or_copy(source / ADAPTER_WEIGHTS_FILE, folder / ADAPTER_WEIGHTS_FILE)
        write_surroundings(folder, config)
        if not (source / GENERATION_FILE).is_file():
            (folder / GENERATION_FILE).unlink()  # the base's counts
        return
    files = weight_files(source)
    if "quantization_config" not in fields:  # packed weights have shapes of their own
        require_fit(shapes(files), config, source)
    written = link_weights(source, folder, files)
    if (source / MANIFEST_FILE).is_file():
        try:
            require_equal(files, read_json(source / MANIFEST_FILE)["tensors"])
        except ValueError as error:
            raise OpenVLAValueError(
                f"{str(error).rstrip('.')}; if the weights were changed on purpose, delete {MANIFEST_FILE} and run it "
                "again."
            ) from error
    if (source / GENERATION_FILE).is_file():
        shutil.copy(source / GENERATION_FILE, folder / GENERATION_FILE)
    write_surroundings(folder, config)
    write_manifest(folder, written)
    if not (source / CARD_FILE).is_file():
        write_card(folder, name)


def _carry_over(source: Path, folder: Path, left_out: set[str], everything: bool) -> None:
    """Bring what is not replaced into the new folder: by link in place of the old one, else by copy.

    Args:
        source: The folder as it is.
        folder: The new one.
        left_out: Names that are not wanted there.
        everything: Hidden files, too.
    """

    def carry(path: str | os.PathLike, new: str | os.PathLike) -> None:
        link = everything or str(path).endswith(WEIGHTS)
        (link_or_copy if link else shutil.copy2)(path, new)

    for path in sorted(source.iterdir()):
        new = folder / path.name
        hidden = path.name.startswith(".") and not everything
        if path.name in left_out or hidden or os.path.lexists(new):
            continue
        if path.is_symlink() and (everything or not path.exists()):
            new.symlink_to(os.readlink(path))
        elif path.is_symlink() and path.is_dir():
            new.symlink_to(path.resolve())
        elif path.is_dir():
            shutil.copytree(path, new, copy_function=carry, symlinks=True)
        else:
            carry(path, new)


def _keep_owners(source: Path, folder: Path) -> None:
    """Give the new folder and its files the modes and owners of those that they replace."""
    for path in [folder, *folder.iterdir()]:
        old = source / path.relative_to(folder)
        found = (old if os.path.lexists(old) else source).lstat()
        if path.is_symlink():
            continue
        if old.exists():
            os.chmod(path, stat.S_IMODE(found.st_mode))
        if (found.st_uid, found.st_gid) != (path.stat().st_uid, path.stat().st_gid):
            with contextlib.suppress(PermissionError):  # only root may give files away
                os.chown(path, found.st_uid, found.st_gid)


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file, by which a writer is noticed."""
    found = {}
    for where, _, names in os.walk(folder):
        for name in names:
            path = Path(where, name)
            found[str(path.relative_to(folder))] = (path.lstat().st_size, path.lstat().st_mtime_ns)
    return found


def _being_written(folder: Path, name: str) -> str:
    return (
        f"{folder} is being written ({name}); nothing was changed. Run it again when the folder is complete, or delete "
        "that file if nothing writes it."
    )


def _differences(source: Path, folder: Path) -> list[str]:
    """Return what is new, in words: code files, and fields of the JSON files."""
    said = []
    code = [path.name for path in sorted(folder.glob("*_openvla.py")) if not _same(source / path.name, path)]
    if code:
        said.append(f"{len(code)} new code files")
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            old: dict[str, Any] = read_json(source / name) if (source / name).is_file() else {}
            new = json.loads((folder / name).read_text(encoding="utf-8"))
            fields = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            if fields:
                said.append(f"{name}: {', '.join(fields)}")
    added = {path.name for path in folder.iterdir()} - {path.name for path in source.iterdir()} - set(code)
    return [*said, f"added {', '.join(sorted(added))}"] if added else said


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()
