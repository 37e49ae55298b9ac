"""``openvla upgrade``: give a saved folder today's code and configuration; its weights stay as they are.

A folder carries the code that it was saved with. Published folders carry code for transformers 4.40.1; folders of an
older openvla carry code that a newer transformers may break. This replaces the code, rewrites config.json and the
processor's files for every supported transformers, and keeps everything else: weights (linked, not copied), tokenizer,
statistics, README.md, your own files. Whole models, 8- and 4-bit models and adapters (LoRA) alike.

pytorch_model.bin, OpenVLA-OFT's part files and native runs need other weights files: ``openvla convert`` makes them.

Examples:
  openvla upgrade my-openvla upgraded
  openvla upgrade my-openvla --in-place
  openvla upgrade someone/openvla-7b-finetuned upgraded
  openvla upgrade me/openvla-7b-my-robot upgraded --publish
  openvla upgrade someone/openvla-7b-finetuned upgraded --create-pr
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from .adapter_files_openvla import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, read_adapter
from .checkpoint_files import has_safetensors, require_equal, weight_files
from .checkpoint_folder import GENERATION_FILE, MANIFEST_FILE, appearing_whole, write_card, write_surroundings
from .convert_checkpoint import kind_of, link_or_copy, make_current
from .download_checkpoint import local_folder
from .loading import MODEL_CLASSES
from .native_checkpoint import read_json
from .oft_checkpoint import part_files
from .publish import publish
from .publishing_openvla import CARD_FILE

CONFIG_FILES = ("config.json", "preprocessor_config.json", "processor_config.json")
OWN_CODE = re.compile(r"\w+_openvla\.py")
WEIGHTS = (".safetensors", ".safetensors.index.json")
# Temporary names under which this package, huggingface_hub and others write before they rename.
TEMPORARY = re.compile(r".*\.(tmp|partial|incomplete)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla upgrade``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", metavar="DIR_OR_ID", help="saved folder, or Hub id")
    parser.add_argument("target", metavar="OUT", type=Path, nargs="?", help="folder to write; must not exist")
    parser.add_argument("--in-place", action="store_true", help="replace the folder itself, at once or not at all")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--revision", help="of a Hub id: branch, tag or commit (default main)")
    parser.add_argument("--token", help="of a Hub id: access token (default that of `hf auth login`, or $HF_TOKEN)")
    parser.add_argument("--publish", action="store_true", help="of a Hub id: also commit the result to its repository")
    parser.add_argument("--create-pr", action="store_true", help="of a Hub id: open a pull request with the result")


def run(args: argparse.Namespace) -> int:
    """Upgrade, report, and publish where asked; return the exit status."""
    pushes = args.publish or args.create_pr
    if pushes and (Path(args.source).exists() or args.source.count("/") != 1):
        raise ValueError(
            f"--publish and --create-pr need a Hub id (organization/name), got {args.source}; for a folder run "
            "openvla publish OUT REPO_ID afterwards."
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
        raise ValueError("An upgrade needs OUT, the folder to write, or --in-place; give one of them.")
    if in_place and not Path(source).exists():
        raise ValueError(f"--in-place is for a folder; {source} is none. Give OUT.")
    folder = local_folder(source, revision=revision, token=token)
    if in_place:
        target = folder = folder.resolve()
    target = Path(target)
    if target.exists() and not (in_place or overwrite):
        raise FileExistsError(f"{target} exists; give another name, or --overwrite to replace it.")
    _require_upgradable(folder)
    before = _state(folder)
    old_code = _code(folder)
    try:
        with appearing_whole(target) as new:
            _write(folder, new, target.name)
            _carry_over(folder, new, {MANIFEST_FILE, *old_code}, everything=in_place)
            changed = _differences(folder, new)
            written = dict(set(_state(folder).items()) ^ set(before.items()))
            if written:
                raise ValueError(_being_written(folder, min(written)))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(f"No space left on the disk of {target}; nothing was changed.") from error
    removed = [name for name in old_code if not (target / name).is_file()]
    print(f"{source}: {'; '.join(changed + [f'removed {name}' for name in removed]) or 'current already'}")
    print(f"{target}: complete, weights as they were")
    return removed


def _require_upgradable(folder: Path) -> None:
    """Raise where a folder cannot be upgraded as it is; the message says what to do."""
    temporary = sorted(path.name for path in folder.iterdir() if TEMPORARY.fullmatch(path.name))
    if temporary:
        raise ValueError(_being_written(folder, temporary[0]))
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
        raise ValueError(f"{folder} {needs_convert}; make a folder of it with: openvla convert {folder} OUT.")


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG_FILE).is_file()


def _write(source: Path, folder: Path, name: str) -> None:
    """Write what is new: configuration, code, processor; link the weights."""
    if _is_adapter(source):
        read_adapter(source)  # raises where it is damaged
        fields = read_json(source / "config.json")
        link_or_copy(source / ADAPTER_WEIGHTS_FILE, folder / ADAPTER_WEIGHTS_FILE)
        write_surroundings(folder, MODEL_CLASSES[fields["model_type"]].config_class.from_dict(fields))
        (folder / GENERATION_FILE).unlink()  # the base's counts
        return
    make_current(source, folder)
    if (source / MANIFEST_FILE).is_file():
        try:
            require_equal(weight_files(folder), read_json(source / MANIFEST_FILE)["tensors"])
        except ValueError as error:
            raise ValueError(
                f"{str(error).rstrip('.')}; if the weights were changed on purpose, delete {MANIFEST_FILE} and run it "
                "again."
            ) from error
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
    for path in sorted(source.iterdir()):
        if path.name in left_out or not (everything or not path.name.startswith(".")):
            continue
        if (folder / path.name).exists():
            continue
        carry = link_or_copy if everything or path.name.endswith(WEIGHTS) else shutil.copy2
        if path.is_dir():
            shutil.copytree(path, folder / path.name, copy_function=carry)
        else:
            carry(path, folder / path.name)


def _code(folder: Path) -> list[str]:
    """Return the names of the code files that came with the folder: those that its JSON files name, and ours."""
    names = {path.name for path in folder.glob("*.py") if OWN_CODE.fullmatch(path.name)}
    for file in (*CONFIG_FILES, "tokenizer_config.json"):
        if not (folder / file).is_file():
            continue
        references = (read_json(folder / file).get("auto_map") or {}).values()
        flat = [name for entry in references for name in (entry if isinstance(entry, list) else [entry]) if name]
        names |= {f"{name.rpartition('--')[2].split('.')[0]}.py" for name in flat}
    return sorted(name for name in names if (folder / name).is_file())


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file, by which a writer is noticed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def _being_written(folder: Path, name: str) -> str:
    return f"{folder} is being written ({name}); nothing was changed. Run it again when the folder is complete."


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
    return said


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() == other.read_bytes()
