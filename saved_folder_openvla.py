"""Keep a saved folder of one meaning: one set of weights, and code files that were written together.

transformers prefers model.safetensors to shards, and leaves the one in place when it writes the other; loading would
then take old weights. Up to 5.5 it files the code of local folders under the folder's last name, and runs helper
modules of the first folder with the entry file of the second. So every code file carries the digest of all files that
were saved with it, and entry files raise where those that are loaded differ.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .errors_openvla import OpenVLAImportError, OpenVLAValueError

logger = logging.get_logger(__name__)

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLED_FILE, PICKLED_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
LAYOUTS = (SINGLE_FILE, INDEX_FILE, PICKLED_FILE, PICKLED_INDEX_FILE)  # in the order in which transformers takes them
SHARD_NUMBER = r"-\d{5}-of-\d{5}\.safetensors"
SHARD = re.compile("model" + SHARD_NUMBER)
ADAPTER_CONFIG_FILE = "adapter_config.json"
REMOTE_CODE = "transformers_modules"  # the package into which transformers copies the code of a folder
FIRST_LINE = "from __future__ import annotations\n"  # of every code file; the digest is written behind it
MARK = "CODE_DIGEST"
MARKED = re.compile(rb'^from __future__ import annotations; CODE_DIGEST = "[0-9a-f]{64}"$', re.MULTILINE)


def require_one_code(module: str) -> None:
    """Raise unless all loaded code files beside an entry file were saved together with it.

    Args:
        module: ``__name__`` of the entry file. Code that does not come from a saved folder is not looked at.

    Raises:
        ImportError: Files of another folder of the same name are loaded, or versions are mixed in this folder.
    """
    package = module.rpartition(".")[0]
    if package.partition(".")[0] != REMOTE_CODE:
        return
    own = getattr(sys.modules[module], MARK, None)
    loaded = [name for name in sys.modules if name.startswith(f"{package}.") and name.endswith("_openvla")]
    wrong = [name for name in loaded if getattr(sys.modules[name], MARK, None) != own]
    if wrong:
        files = sorted(f"{name.rpartition('.')[2]}.py" for name in wrong)
        raise OpenVLAImportError(
            f"The code files do not fit each other: {', '.join(files)} were not saved with "
            f"{module.rpartition('.')[2]}.py. If they are of another folder of the same name "
            f"({package.rpartition('.')[2]}) that this process has loaded, load this one in a new process, or rename "
            "it. If two versions of the package saved into this folder, make it one again: openvla upgrade FOLDER "
            "--in-place. Or `import openvla` first: the installed package serves every folder."
        )


def mark_code(folder: str | os.PathLike) -> None:
    """Write into every code file of a saved folder the digest of all files that are saved together.

    Files that differ from the running code, such as the user's own, stay as they are; so do all of them where the
    running code comes from a saved folder and carries its digest already. Files of another version of the package that
    lie in the folder are warned of.
    """
    if MARK in globals():
        return
    files = sorted(Path(__file__).parent.glob("*_openvla.py"))
    sources = {path.name: path.read_text(encoding="utf-8") for path in files}
    digest = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sources.items()).encode()).hexdigest()
    line = f'{FIRST_LINE.rstrip()}; {MARK} = "{digest}"\n'
    others = []
    for name, text in sources.items():
        saved = Path(folder) / name
        content = saved.read_bytes() if saved.is_file() else b""
        if MARKED.search(content) and digest.encode() not in content:
            others.append(name)
        if content == text.encode():
            temporary = saved.with_name(f".{name}.{os.getpid()}.tmp")
            temporary.write_bytes(text.replace(FIRST_LINE, line, 1).encode())
            os.replace(temporary, saved)
    if others:
        logger.warning_once(
            f"{folder} holds code of another version of this package ({', '.join(others)}) beside what was saved now: "
            "with trust_remote_code it will not load. Make it one again: openvla upgrade FOLDER --in-place."
        )


class MarksCode:
    """Processors: their settings, and the code beside them."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> list[str]:
        """Save as transformers does, and write the digest into the code files."""
        files = super().save_pretrained(save_directory, **kwargs)
        mark_code(save_directory)
        return files


@contextmanager
def one_set_of_weights(folder: str | os.PathLike, variant: str | None = None) -> Iterator[None]:
    """Remove from a folder, when the block has written weights into it, what an earlier save left in another layout.

    That is what transformers would load in their place, and the other layout of the same format: model.safetensors
    beside new shards, shards and their index beside a new model.safetensors, both beside a new pytorch_model.bin.

    Args:
        folder: Where the weights are written.
        variant: As of ``save_pretrained``, a part of the files' names.
    """
    folder, names = Path(folder), [_of_variant(name, variant) for name in LAYOUTS]
    before = {name: _state(folder / name) for name in names}
    yield
    written = [name for name in names if _state(folder / name) not in (None, before[name])]
    if len(written) != 1:
        return
    rank = names.index(written[0])
    stale = [name for name in names[: max(rank + 1, 2)] if before[name] and name != written[0]]
    if names[1] in stale:
        stem = re.escape(names[0].removesuffix(".safetensors"))
        stale += [path.name for path in folder.iterdir() if re.fullmatch(stem + SHARD_NUMBER, path.name)]
    _remove(folder, stale)


def _of_variant(name: str, variant: str | None) -> str:
    """Return the name that transformers gives to a weights file of a variant."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def refuse_two_kinds(folder: str | os.PathLike) -> None:
    """Raise ValueError where a local folder holds both an adapter and whole weights, of which one would be ignored."""
    weights = [name for name in LAYOUTS if os.path.isfile(os.path.join(folder, name))]
    if weights and os.path.isfile(os.path.join(folder, ADAPTER_CONFIG_FILE)):
        raise OpenVLAValueError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG_FILE}) and whole weights ({weights[0]}); which of them is "
            "meant cannot be told. Move the adapter's files (adapter_*, openvla_adapter.json) to a folder of their own."
        )


def require_own_kind(folder: str | os.PathLike, is_adapter: bool) -> None:
    """Raise before an adapter is saved beside whole weights, or whole weights beside an adapter.

    Raises:
        ValueError: What is there would be loaded in place of what is saved, or be ignored.
    """
    names = LAYOUTS if is_adapter else (ADAPTER_CONFIG_FILE,)
    there = [name for name in names if os.path.isfile(os.path.join(folder, name))]
    if there:
        kinds = ("an adapter", "whole weights") if is_adapter else ("whole weights", "an adapter")
        raise OpenVLAValueError(
            f"{folder} holds {kinds[1]} ({there[0]}), and {kinds[0]} beside it could not be told from it when it is "
            "loaded. Give another folder, or delete those files first."
        )


def _remove(folder: Path, names: list[str]) -> None:
    if not names:
        return
    for name in names:
        (folder / name).unlink()
    logger.info(f"{folder}: removed {', '.join(names)} of an earlier save.")


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what tells whether a file was written again; None where there is none."""
    if not path.is_file():
        return None
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def unused_weights(names: Iterable[str]) -> list[str]:
    """Return which of a folder's files are weights that transformers does not load: shards beside model.safetensors."""
    names = list(names)
    return [name for name in names if name == INDEX_FILE or SHARD.fullmatch(name)] if SINGLE_FILE in names else []


def warn_of_two_sets(folder: str | os.PathLike) -> None:
    """Warn where a folder holds model.safetensors and shards, of which transformers loads the former."""
    if (Path(folder) / SINGLE_FILE).is_file() and (Path(folder) / INDEX_FILE).is_file():
        logger.warning_once(
            f"{folder} holds {SINGLE_FILE} and {INDEX_FILE}, of two saves. The former is read, as transformers does; "
            "if the shards are the newer weights, delete it, else delete the index and the shards."
        )
