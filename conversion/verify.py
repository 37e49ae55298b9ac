"""``openvla verify``: check every file and tensor of a folder that ``openvla convert`` wrote."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors_openvla import OpenVLAFileNotFoundError, OpenVLAValueError
from .files import file_digest, read_json
from .hub_folder import MANIFEST_FILE
from .hub_weights import weight_files
from .safetensors_io import require_digests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla verify``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that openvla convert wrote")


def run(args: argparse.Namespace) -> int:
    """Check every file and tensor; return the exit status."""
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
        raise OpenVLAFileNotFoundError(
            f"{folder} has no {MANIFEST_FILE}; only folders that openvla convert wrote have one."
        )
    manifest = read_json(folder / MANIFEST_FILE)
    wrong = sorted(
        name
        for name, digest in manifest["files"].items()
        if not (folder / name).is_file() or file_digest(folder / name) != digest
    )
    if wrong:
        raise OpenVLAValueError(f"{folder} is not what was written: {wrong} changed or missing.")
    require_digests(weight_files(folder), manifest["tensors"])
    return len(manifest["tensors"])
