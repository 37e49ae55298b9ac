"""Check every file and tensor of a folder that ``openvla convert`` wrote."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from ..errors_openvla import OpenVLAFileNotFoundError, OpenVLAValueError
from .hub_folder import MANIFEST_FILE
from .safetensors_io import digest_file, require_equal, weight_files


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
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    wrong = [file for file in manifest["files"] if not (folder / file).is_file()]
    wrong += [f for f, sha in manifest["files"].items() if f not in wrong and digest_file(folder / f) != sha]
    if wrong:
        raise OpenVLAValueError(f"{folder} is not what was written: {sorted(wrong)} changed or missing.")
    require_equal(weight_files(folder), manifest["tensors"])
    return len(manifest["tensors"])
