"""Files and folders: JSON, digests, links, and a folder that is written completely or not at all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ..errors_openvla import OpenVLAFileExistsError, OpenVLAFileNotFoundError, OpenVLAValueError

HASH_CHUNK_BYTES = 1 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file does not hold a JSON object.
    """
    if not path.is_file():
        raise OpenVLAFileNotFoundError(f"{path.parent} has no {path.name}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OpenVLAValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise OpenVLAValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def file_digest(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def link_or_copy(source: str | os.PathLike, target: str | os.PathLike) -> bool:
    """Make a hard link where the file system allows one, else a copy; return whether it is a link."""
    source = Path(source)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)
        return False
    return True


def require_absent(target: Path, overwrite: bool) -> None:
    """Raise FileExistsError if the target of a command exists and may not be replaced."""
    if target.exists() and not overwrite:
        raise OpenVLAFileExistsError(f"{target} exists; give another name, or --overwrite to replace it.")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Write a directory atomically: yield a temporary sibling directory and rename it to ``target`` on success.

    On an error the temporary directory is removed and ``target`` stays as it was. What an interrupted run left beside
    ``target`` is cleaned up first (:func:`clean_up_interrupted_runs`).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clean_up_interrupted_runs(target)
    prefix = _temporary_prefix(target)
    partial, previous = (target.parent / f"{prefix}{os.getpid()}.{suffix}" for suffix in ("partial", "previous"))
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            os.replace(target, previous)
        try:
            os.replace(partial, target)
        except OSError:
            if previous.exists():
                os.replace(previous, target)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def clean_up_interrupted_runs(target: Path) -> None:
    """Restore the backup of ``target`` that an interrupted run left, and remove what it had written so far.

    Only files of processes that ran on this machine and have ended are touched.
    """
    prefix = _temporary_prefix(target)
    for path in target.parent.glob(f"{glob.escape(prefix)}*"):
        pid, _, suffix = path.name.removeprefix(prefix).partition(".")
        if not pid.isdigit() or psutil.pid_exists(int(pid)) and int(pid) != os.getpid():
            continue
        if suffix == "previous" and not target.exists():
            os.replace(path, target)
        elif suffix in ("partial", "previous"):
            shutil.rmtree(path)


def _temporary_prefix(target: Path) -> str:
    return f".{target.name}.{platform.node()}."
