"""Find a checkpoint's folder, locally or on the Hugging Face Hub; only the files needed are downloaded."""

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
    """Return a local folder as it is, or download a Hub repository to the cache; interrupted downloads resume.

    Args:
        source: A folder, "organization/name", or "organization/name/folder" for one inside a repository.
        checkpoint: Of a native run, the file in checkpoints/ (see :func:`~.prismatic_format.choose_checkpoint`).
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
    organization, name, *subfolders = os.fspath(source).split("/")
    repo_id, subfolder = f"{organization}/{name}", "/".join(subfolders)
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
    folder = api.snapshot_download(
        repo_id, revision=revision, allow_patterns=files_to_download(names, subfolder, checkpoint)
    )
    return Path(folder, subfolder)


def files_to_download(names: list[str], subfolder: str, checkpoint: str | None) -> list[str]:
    """Return the files of a repository that a conversion reads.

    Args:
        names: All files of the repository.
        subfolder: The checkpoint's folder in it, "" for the root.
        checkpoint: Of a native run, the file in checkpoints/ (see :func:`~.prismatic_format.choose_checkpoint`).

    Raises:
        FileNotFoundError: The repository has no such folder or checkpoint.
    """
    paths = [PurePosixPath(name) for name in names if not subfolder or name.startswith(f"{subfolder}/")]
    top_level = [path for path in paths if path.parent == PurePosixPath(subfolder)]
    if not top_level:
        raise OpenVLAFileNotFoundError(f"The repository has no folder {subfolder!r}; there is {sorted({*names})[:20]}.")
    needed = [path for path in top_level if path.suffix not in UNSAFE_SUFFIXES or PART_FILE.fullmatch(path.name)]
    if not any(path.name == "config.json" for path in top_level):  # no whole model: OFT's unmerged adapter
        needed += [path for path in paths if path.parent == PurePosixPath(subfolder, ADAPTER_FOLDER)]
    checkpoints = [path for path in paths if path.parent == PurePosixPath(subfolder, CHECKPOINT_FOLDER)]
    if checkpoints:
        chosen = choose_checkpoint([path.name for path in checkpoints], checkpoint)
        needed += [path for path in checkpoints if path.name == chosen]
    elif not any(path.suffix == WEIGHT_SUFFIX for path in top_level):
        needed += [path for path in top_level if path.name.startswith("pytorch_model")]
    return [str(path) for path in needed]
