"""``openvla verify``: check every file and tensor that ``openvla convert`` wrote, or that vLLM can run a folder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors_openvla import OpenVLAFileNotFoundError, OpenVLAValueError
from .files import file_digest, read_json
from .hub_folder import MANIFEST_FILE
from .hub_weights import weight_files
from .safetensors_io import require_digests
from .vllm import VLLM_VERSION, require_vllm_support


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla verify``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that openvla convert wrote")
    parser.add_argument(
        "--for",
        dest="engine",
        choices=("vllm",),
        help=f"check instead that this engine (vLLM {VLLM_VERSION}) can run any folder as it was trained",
    )


def run(args: argparse.Namespace) -> int:
    """Check every file and tensor; return the exit status."""
    if args.engine == "vllm":
        num_tensors = require_vllm_support(args.folder)
        print(
            f"{args.folder}: vLLM {VLLM_VERSION} can run it ({num_tensors} tensors). Prompts must end with the empty "
            "token 29871; openvla.actions_from_tokens turns vLLM's tokens into actions"
        )
        return 0
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
