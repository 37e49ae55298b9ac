"""Keep a saved folder consistent (one set of weights, code files that were saved together), and push it to the Hub.

transformers prefers model.safetensors to shards, and leaves the one in place when it writes the other; loading would
then take old weights. Up to 5.5 it caches the code of local folders under the folder's last name, and runs helper
modules of the first folder with the entry file of the second. So every code file carries the digest of all files that
were saved with it, and entry files raise where the digests of the loaded files differ.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from transformers.utils import PushToHubMixin, logging

from .errors_openvla import OpenVLAImportError, OpenVLAValueError

logger = logging.get_logger(__name__)

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLED_FILE, PICKLED_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
LAYOUTS = (SINGLE_FILE, INDEX_FILE, PICKLED_FILE, PICKLED_INDEX_FILE)  # in transformers' order of preference
SHARD_NUMBER = r"-\d{5}-of-\d{5}\.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"

REMOTE_CODE = "transformers_modules"  # the package into which transformers copies the code of a folder
FIRST_LINE = "from __future__ import annotations\n"  # of every code file; the digest is written behind it
MARK = "CODE_DIGEST"
MARKED = re.compile(rb'^from __future__ import annotations; CODE_DIGEST = "[0-9a-f]{64}"$', re.MULTILINE)


def require_same_code(module: str) -> None:
    """Raise ImportError unless all loaded code files of an entry file's folder were saved together with it.

    Args:
        module: ``__name__`` of the entry file. Code that does not come from a saved folder is not checked.
    """
    package, _, entry = module.rpartition(".")
    if package.partition(".")[0] != REMOTE_CODE:
        return
    digest = getattr(sys.modules[module], MARK, None)
    loaded = [name for name in sys.modules if name.startswith(f"{package}.") and name.endswith("_openvla")]
    others = sorted(name for name in loaded if getattr(sys.modules[name], MARK, None) != digest)
    if others:
        files = ", ".join(f"{name.rpartition('.')[2]}.py" for name in others)
        raise OpenVLAImportError(
            f"The code files do not fit each other: {files} were not saved with {entry}.py. If they are of another "
            f"folder of the same name ({package.rpartition('.')[2]}) that this process has loaded, load this one in a "
            "new process, or rename it. If two versions of the package saved into this folder, make it one again: "
            "openvla upgrade FOLDER --in-place. Or `import openvla` first: the installed package serves every folder."
        )


def mark_code(folder: str | os.PathLike) -> None:
    """Write the digest of all files that are saved together into every code file of a saved folder.

    Files that differ from the running code, such as the user's, are not changed; a warning is logged for files of
    another version of the package. Code that comes from a saved folder carries its digest already.
    """
    if MARK in globals():
        return
    paths = sorted(Path(__file__).parent.glob("*_openvla.py"))
    sources = {path.name: path.read_text(encoding="utf-8") for path in paths}
    digest = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sources.items()).encode()).hexdigest()
    line = f'{FIRST_LINE.rstrip()}; {MARK} = "{digest}"\n'
    other_versions = []
    for name, text in sources.items():
        saved = Path(folder) / name
        content = saved.read_bytes() if saved.is_file() else b""
        if MARKED.search(content) and digest.encode() not in content:
            other_versions.append(name)
        if content == text.encode():
            temporary = saved.with_name(f".{name}.{os.getpid()}.tmp")
            temporary.write_bytes(text.replace(FIRST_LINE, line, 1).encode())
            os.replace(temporary, saved)
    if other_versions:
        logger.warning_once(
            f"{folder} holds code of another version of this package ({', '.join(other_versions)}) beside what was "
            "saved now: with trust_remote_code it will not load. Make it one again: openvla upgrade FOLDER --in-place."
        )


@contextmanager
def one_set_of_weights(folder: str | os.PathLike, variant: str | None = None) -> Iterator[None]:
    """Context manager that removes weights of an earlier save in another layout after new weights were written.

    Else transformers would load those: model.safetensors beside new shards, or either beside a new pytorch_model.bin.
    ``variant`` is ``save_pretrained``'s argument, a part of the files' names.
    """
    folder, names = Path(folder), [_variant_name(name, variant) for name in LAYOUTS]
    before = {name: _file_state(folder / name) for name in names}
    yield
    written = [name for name in names if _file_state(folder / name) not in (None, before[name])]
    if len(written) != 1:
        return
    rank = names.index(written[0])
    stale = [name for name in names[: max(rank + 1, 2)] if before[name] and name != written[0]]
    if names[1] in stale:
        stem = re.escape(names[0].removesuffix(".safetensors"))
        stale += [path.name for path in folder.iterdir() if re.fullmatch(stem + SHARD_NUMBER, path.name)]
    for name in stale:
        (folder / name).unlink()
    if stale:
        logger.info(f"{folder}: removed {', '.join(stale)} of an earlier save.")


def _variant_name(name: str, variant: str | None) -> str:
    """Return the name that transformers gives to a weights file of a variant."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def _file_state(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is written again; None where there is no file."""
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def warn_of_two_sets(folder: str | os.PathLike) -> None:
    """Warn where a folder holds model.safetensors and shards, of which transformers loads the former."""
    if (Path(folder) / SINGLE_FILE).is_file() and (Path(folder) / INDEX_FILE).is_file():
        logger.warning_once(
            f"{folder} holds {SINGLE_FILE} and {INDEX_FILE}, of two saves. The former is read, as transformers does; "
            "if the shards are the newer weights, delete it, else delete the index and the shards."
        )


def _weights_in(folder: str | os.PathLike) -> str | None:
    """Return the name of a local folder's whole weights (a file or an index); None where it holds none."""
    return next((name for name in LAYOUTS if os.path.isfile(os.path.join(folder, name))), None)


def _has_adapter(folder: str | os.PathLike) -> bool:
    return os.path.isfile(os.path.join(folder, ADAPTER_CONFIG_FILE))


def refuse_two_kinds(folder: str | os.PathLike) -> None:
    """Raise ValueError where a local folder holds both an adapter and whole weights, one of which would be ignored."""
    weights = _weights_in(folder)
    if weights and _has_adapter(folder):
        raise OpenVLAValueError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG_FILE}) and whole weights ({weights}); which of them is "
            "meant cannot be told. Move the adapter's files (adapter_*, openvla_adapter.json) to a folder of their own."
        )


def require_own_kind(folder: str | os.PathLike, is_adapter: bool) -> None:
    """Raise ValueError before an adapter is saved beside whole weights, or whole weights beside an adapter."""
    if is_adapter:
        kind, other_kind, other_file = "an adapter", "whole weights", _weights_in(folder)
    else:
        kind, other_kind = "whole weights", "an adapter"
        other_file = ADAPTER_CONFIG_FILE if _has_adapter(folder) else None
    if other_file:
        raise OpenVLAValueError(
            f"{folder} holds {other_kind} ({other_file}), and {kind} beside it could not be told from it when it is "
            "loaded. Give another folder, or delete those files first."
        )


class PushToHub(PushToHubMixin):
    """Mixin of models and processors: ``push_to_hub``, the same on every transformers version.

    Attributes:
        hub_uploader: ``openvla.conversion.hub_upload.push_to_hub``; None, for transformers' own, without the package.
    """

    hub_uploader: ClassVar[Callable[..., Any] | None] = None

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Save and upload in one commit; arguments and errors are those of ``hub_uploader``."""
        return (super().push_to_hub if self.hub_uploader is None else self.hub_uploader)(*args, **kwargs)
