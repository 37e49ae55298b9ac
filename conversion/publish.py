"""``openvla publish``: check a folder and upload it to the Hugging Face Hub in one commit.

A folder is uploaded only if it is complete: configuration, this package's code, weights that fit, processor, tokenizer
and, for a robot, statistics. The same holds for quantised folders and adapters (LoRA), whose processor may be their
base's. Where openvla convert wrote a manifest, everything is compared with it. Uploads resume:
files that have arrived are not sent again.

Examples:
  openvla publish my-openvla me/openvla-7b-my-robot --dry-run
  openvla publish my-openvla me/openvla-7b-my-robot --private
  openvla publish my-openvla me/openvla-7b-my-robot --branch v2
  openvla publish my-openvla openvla/openvla-7b --create-pr
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from ..adapters.files import read_adapter
from ..configuration_openvla import ADAPTER_CONFIG_FILE, OpenVLAConfig
from ..errors_openvla import OpenVLAValueError
from ..loading import MODEL_CLASSES
from ..saved_folder import refuse_two_kinds
from .console import printed_logs
from .files import read_json
from .hub_folder import MANIFEST_FILE, require_matching_shapes
from .hub_upload import CARD_FILE, publishable, push_folder
from .hub_weights import weight_files
from .processor_files import has_tokenizer
from .safetensors_io import tensor_shapes
from .verify import verify

logger = logging.getLogger(__name__)

# Code files that only a processor needs.
PROCESSOR_CODE = {f"{name}_openvla.py" for name in ("images", "processing")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``openvla publish``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder that openvla convert or save_pretrained wrote")
    parser.add_argument(
        "repo_id", metavar="REPO_ID", help='"name" or "organization/name"; created if it does not exist'
    )
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--branch", help="branch to push to, created if it does not exist (default main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of pushing")
    parser.add_argument("--message", default="Upload model", help="title of the commit (default %(default)r)")
    parser.add_argument("--token", help="access token (default that of `hf auth login`, or $HF_TOKEN)")
    parser.add_argument("--dry-run", action="store_true", help="check, and list what would be uploaded; use no network")


def run(args: argparse.Namespace) -> int:
    """Check, list, upload; return the exit status."""
    with printed_logs():
        publish(
            args.folder,
            args.repo_id,
            private=args.private,
            branch=args.branch,
            create_pr=args.create_pr,
            message=args.message,
            token=args.token,
            dry_run=args.dry_run,
        )
    return 0


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    message: str = "Upload model",
    token: str | None = None,
    dry_run: bool = False,
    remove: Sequence[str] = (),
) -> str | None:
    """Check a folder and upload it in one commit; what is uploaded is logged.

    Args:
        folder: A complete folder of this package.
        repo_id: "name" or "organization/name".
        private: Whether a new repository is private.
        branch: Branch to push to; None is main.
        create_pr: Open a pull request instead.
        message: Title of the commit.
        token: Access token; None takes the one of ``hf auth login``.
        dry_run: Upload nothing.
        remove: Files of the repository that the commit removes, such as old code.

    Returns:
        The address of the commit or pull request; None for a dry run.

    Raises:
        ValueError: Others could not load the folder.
        FileNotFoundError: There is no folder, or no config.json in it.
    """
    require_complete(folder)
    _log_files(folder, repo_id, branch)
    if dry_run:
        logger.info("dry run: nothing was uploaded")
        return None
    commit = push_folder(
        folder,
        repo_id,
        private=private,
        token=token,
        revision=branch,
        create_pr=create_pr,
        commit_message=message,
        remove=remove,
    )
    url = commit.pr_url if create_pr else commit.commit_url
    logger.info(url)
    return url


def _log_files(folder: Path, repo_id: str, branch: str | None) -> None:
    """Log the files that are uploaded, their sizes in bytes, and the files that are left out."""
    files = publishable(folder)
    size = sum(path.stat().st_size for path in files.values())
    for name, path in files.items():
        logger.info(f"{path.stat().st_size:>15,}  {name}")
    if CARD_FILE not in files:
        logger.info(f"{'':>15}  {CARD_FILE} (written where the repository has none)")
    left_out = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path not in files.values()
    )
    if left_out:
        logger.info(f"left out, hidden, able to run code when read, or shards that are not loaded: {left_out}")
    destination = f"{repo_id}, branch {branch}" if branch else repo_id
    logger.info(f"{size:>15,}  bytes in {len(files)} files for {destination}")


def require_complete(folder: Path) -> None:
    """Raise if others could not load the folder from the Hub; the message names everything that is missing.

    Raises:
        FileNotFoundError: There is no folder, or no config.json in it.
        ValueError: The folder is not of this package, is incomplete, or differs from what openvla convert wrote.
    """
    fields = read_json(folder / "config.json")
    if fields.get("model_type") not in MODEL_CLASSES:
        raise OpenVLAValueError(
            f"{folder} holds a model of type {fields.get('model_type')!r}, not {sorted(MODEL_CLASSES)}."
        )
    code = {f"{reference.split('.')[0]}.py" for reference in (fields.get("auto_map") or {}).values()}
    shipped = {path.name for path in Path(__file__).parents[1].glob("*_openvla.py")}
    if not code or not code <= shipped:
        raise OpenVLAValueError(
            f"{folder} carries the old remote code ({sorted(code) or 'no auto_map'}), for transformers 4.40.1 "
            f"only. Make it current first: openvla upgrade {folder} NEW_DIR."
        )
    is_adapter = (folder / ADAPTER_CONFIG_FILE).is_file()
    has_processor = not is_adapter or (folder / "processor_config.json").is_file()  # else the base's is used
    processor_files = {"preprocessor_config.json", "processor_config.json"}
    needed = shipped | processor_files if has_processor else shipped - PROCESSOR_CODE
    missing = sorted(name for name in needed if not (folder / name).is_file())
    if has_processor and not has_tokenizer(folder):
        missing.append("a tokenizer")
    if missing:
        raise OpenVLAValueError(
            f"{folder} is not complete: {missing} missing. Save both parts into it: model.save_pretrained(DIR) and "
            "processor.save_pretrained(DIR)."
        )
    refuse_two_kinds(folder)
    config = MODEL_CLASSES[fields["model_type"]].config_class.from_dict(fields)
    if isinstance(config, OpenVLAConfig) and not config.norm_stats:
        raise OpenVLAValueError(
            f"{folder} has no action statistics, without which nobody can act with it: "
            "model.add_norm_stats(key, statistics), then save it again."
        )
    if is_adapter:
        read_adapter(folder)
    elif "quantization_config" in fields:  # packed weights have other shapes
        weight_files(folder)
    else:
        require_matching_shapes(tensor_shapes(weight_files(folder)), config, folder)
    if (folder / MANIFEST_FILE).is_file():
        verify(folder)
