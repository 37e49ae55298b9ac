"""A checkpoint's folder, whether it lies here or on the Hugging Face Hub; of a repository, only the files needed."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi
from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError

from ..errors_openvla import OpenVLAFileNotFoundError, OpenVLAValueError
from .hub_upload import UNSAFE_SUFFIXES
from .oft_format import ADAPTER_FOLDER, PART_FILE
from .prismatic_format import CHECKPOINT_FOLDER, choose_checkpoint

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.+-]*(/[\w.+-]+)*")  # organization/name, then folders inside the repository
WEIGHT_SUFFIX = ".safetensors"


def local_folder(
    source: str | os.PathLike,
    *,
    checkpoint: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """The folder of a source: itself, or a Hub repository's in the cache. Downloads resume where they broke off.

    Args:
        source: A folder, "organization/name", or "organization/name/folder" for one inside a repository.
        checkpoint: Of a native run, the file in checkpoints/; None as :func:`choose_checkpoint` says.
        revision: Branch, tag or commit; None is main.
        token: Access token; None takes the one of ``hf auth login``.

    Raises:
        FileNotFoundError: There is no such folder and no such repository, revision or checkpoint.
        ValueError: A revision was given for a local folder.
    """
    path = Path(source)
    if path.exists():
        if revision is not None:
            raise OpenVLAValueError(f"--revision goes with a Hub id; {source} is a folder here.")
        return path
    if not HUB_ID.fullmatch(os.fspath(source)):
        raise OpenVLAFileNotFoundError(f"No folder at {source}, and that is no Hub id (organization/name).")
    organization, name, *inside = os.fspath(source).split("/")
    repo_id, under = f"{organization}/{name}", "/".join(inside)
    api = HfApi(token=token)
    try:
        names = api.list_repo_files(repo_id, revision=revision)
    except RevisionNotFoundError as error:
        raise OpenVLAFileNotFoundError(f"{repo_id} on the Hub has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise OpenVLAFileNotFoundError(
            f"No folder at {source}, and no repository {repo_id} on the Hub that this token may read; for a private or "
            "gated one pass --token, or run hf auth login."
        ) from error
    folder = api.snapshot_download(repo_id, revision=revision, allow_patterns=_needed(names, under, checkpoint))
    return Path(folder, under)


def _needed(names: list[str], under: str, checkpoint: str | None) -> list[str]:
    """Of a repository's files, those that a conversion reads."""
    inside = [PurePosixPath(name) for name in names if not under or name.startswith(f"{under}/")]
    beside = [path for path in inside if path.parent == PurePosixPath(under)]
    if not beside:
        raise OpenVLAFileNotFoundError(f"The repository has no folder {under!r}; there is {sorted({*names})[:20]}.")
    wanted = [path for path in beside if path.suffix not in UNSAFE_SUFFIXES or PART_FILE.fullmatch(path.name)]
    if not any(path.name == "config.json" for path in beside):  # no whole model: OFT's unmerged adapter
        wanted += [path for path in inside if path.parent == PurePosixPath(under, ADAPTER_FOLDER)]
    checkpoints = [path for path in inside if path.parent == PurePosixPath(under, CHECKPOINT_FOLDER)]
    if checkpoints:
        chosen = choose_checkpoint([path.name for path in checkpoints], checkpoint)
        wanted += [path for path in checkpoints if path.name == chosen]
    elif not any(path.suffix == WEIGHT_SUFFIX for path in beside):
        wanted += [path for path in beside if path.name.startswith("pytorch_model")]
    return [str(path) for path in wanted]
