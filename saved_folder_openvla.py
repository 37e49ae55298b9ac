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

logger = logging.get_logger(__name__)

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
REMOTE_CODE = "transformers_modules"  # the package into which transformers copies the code of a folder
FIRST_LINE = "from __future__ import annotations\n"  # of every code file; the digest is written behind it
MARK = "CODE_DIGEST"


def require_one_code(module: str) -> None:
    """Raise unless all loaded code files beside an entry file were saved together with it.

    Args:
        module: ``__name__`` of the entry file. Code that does not come from a saved folder is not looked at.

    Raises:
        ImportError: Files of another folder of the same name are loaded.
    """
    package = module.rpartition(".")[0]
    if package.partition(".")[0] != REMOTE_CODE:
        return
    own = getattr(sys.modules[module], MARK, None)
    loaded = [name for name in sys.modules if name.startswith(f"{package}.") and name.endswith("_openvla")]
    wrong = [name for name in loaded if getattr(sys.modules[name], MARK, None) != own]
    if wrong:
        files = sorted(f"{name.rpartition('.')[2]}.py" for name in wrong)
        raise ImportError(
            f"The code of this folder and that of another folder of the same name ({package.rpartition('.')[2]}) do "
            f"not fit: {', '.join(files)} of the other one are loaded in this process. Load this folder in a new "
            "process, rename it, or `import openvla` first: then the installed package serves both."
        )


def mark_code(folder: str | os.PathLike) -> None:
    """Write into every code file of a saved folder the digest of all files that are saved together.

    Files that differ from the running code, such as the user's own, stay as they are; so do all of them where the
    running code comes from a saved folder and carries its digest already.
    """
    if MARK in globals():
        return
    files = sorted(Path(__file__).parent.glob("*_openvla.py"))
    sources = {path.name: path.read_text(encoding="utf-8") for path in files}
    digest = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sources.items()).encode()).hexdigest()
    line = f'{FIRST_LINE.rstrip()}; {MARK} = "{digest}"\n'
    for name, text in sources.items():
        saved = Path(folder) / name
        if saved.is_file() and saved.read_bytes() == text.encode():
            temporary = saved.with_name(f".{name}.{os.getpid()}.tmp")
            temporary.write_bytes(text.replace(FIRST_LINE, line, 1).encode())
            os.replace(temporary, saved)


class MarksCode:
    """Processors: their settings, and the code beside them."""

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> list[str]:
        """Save as transformers does, and write the digest into the code files."""
        files = super().save_pretrained(save_directory, **kwargs)
        mark_code(save_directory)
        return files


@contextmanager
def one_set_of_weights(folder: str | os.PathLike) -> Iterator[None]:
    """Remove from a folder, when the block has written weights into it, what an earlier save left of the other kind.

    That is model.safetensors beside new shards, or shards and their index beside a new model.safetensors.
    """
    folder = Path(folder)
    before = {name: _state(folder / name) for name in (SINGLE_FILE, INDEX_FILE)}
    yield
    written = [name for name, state in before.items() if _state(folder / name) not in (None, state)]
    if written == [INDEX_FILE] and before[SINGLE_FILE]:
        _remove(folder, [SINGLE_FILE])
    elif written == [SINGLE_FILE] and before[INDEX_FILE]:
        shards = [path.name for path in folder.iterdir() if SHARD.fullmatch(path.name)]
        _remove(folder, [INDEX_FILE, *shards])


def _remove(folder: Path, names: list[str]) -> None:
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
