"""Upload a saved folder to the Hugging Face Hub in one commit, with a model card."""

from __future__ import annotations

import json
import os
import re
import tempfile
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

from ..actions_openvla import NORMALIZATIONS
from ..configuration_openvla import ADAPTER_CONFIG_FILE
from ..dimension_labels import dimension_labels
from ..errors_openvla import OpenVLATypeError, OpenVLAValueError
from ..saved_folder import INDEX_FILE, LAYOUTS, SHARD_NUMBER, SINGLE_FILE

CARD_FILE = "README.md"
VQ_LICENSE_NOTE = (
    "The weights `action_vq.*` are a VQ autoencoder of openvla-mini. It was published (Stanford-ILIAD/pretrain_vq) "
    "**without a declared licence**; ask its authors before you share or use it."
)
SHARD = re.compile("model" + SHARD_NUMBER)
# Formats that can run code when they are read; nobody should have to trust one, so none is uploaded.
UNSAFE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class Saveable(Protocol):
    """A model or a processor."""

    @abstractmethod
    def save_pretrained(self, save_directory: str, *, max_shard_size: int | str) -> Any:
        """Write all files to a folder."""


def push_to_hub(
    saveable: Saveable,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "5GB",
    tags: list[str] | None = None,
    use_temp_dir: bool | None = None,
    safe_serialization: bool | None = None,
    **unknown: Any,
) -> CommitInfo:
    """Save a model or processor to a temporary folder and upload all of it in one commit.

    A model brings its weights, code, configuration, statistics and, where the repository has none, a card with the
    action space. This is the ``push_to_hub`` method of models and processors (set by ``openvla.loading``).

    Args:
        saveable: The model or processor.
        repo_id: "name" or "organization/name"; created if it does not exist.
        commit_message: Title of the commit.
        commit_description: Body of the commit message.
        private: Whether a new repository is private; None for the account's default, or an existing one as it is.
        token: Access token; None takes the one of ``hf auth login``.
        revision: Branch to push to, created if it does not exist; None is main.
        create_pr: Open a pull request instead.
        max_shard_size: Largest size of a weight file.
        tags: Tags of the card, which is written where the repository has none.
        use_temp_dir: None or True; taken for transformers 4.x scripts.
        safe_serialization: None or True; likewise.
        **unknown: Refused unless None.

    Returns:
        The commit: its URL, its hash and, with ``create_pr``, the pull request's URL.

    Raises:
        ValueError: ``safe_serialization=False``, ``use_temp_dir=False``, ``tags`` without a card, or ``private`` that
            contradicts an existing repository.
        TypeError: Another argument, such as the ``organization`` and ``use_auth_token`` of old versions.
        huggingface_hub.errors.HfHubHTTPError: The Hub refused: no token, or no rights.
    """
    if safe_serialization is False:
        raise OpenVLAValueError("safe_serialization=False would upload a pickle, which can run code; leave it out.")
    if use_temp_dir is False:
        raise OpenVLAValueError(
            "use_temp_dir=False would leave a folder here; leave it out, or call save_pretrained too."
        )
    unknown = {name: value for name, value in unknown.items() if value is not None}
    if unknown:
        raise OpenVLATypeError(
            f"push_to_hub takes no {', '.join(sorted(unknown))}. Give an organization in repo_id "
            "('organization/name') and a token as token."
        )
    with tempfile.TemporaryDirectory() as folder:
        saveable.save_pretrained(folder, max_shard_size=max_shard_size)
        return push_folder(
            folder,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or f"Upload {type(saveable).__name__}",
            commit_description=commit_description,
            tags=tags,
            model_tags=getattr(saveable, "model_tags", None),
        )


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    tags: list[str] | None = None,
    model_tags: list[str] | None = None,
    remove: Sequence[str] = (),
) -> CommitInfo:
    """Upload a folder in one commit.

    Weights of the repository in another layout (shards, or one file) are removed by the same commit. A folder with a
    configuration but no card gets one, unless the repository has its own.

    Args:
        folder: The folder.
        repo_id: As :func:`push_to_hub`, as all arguments that are not named here.
        private: As above.
        token: As above.
        revision: As above.
        create_pr: As above.
        commit_message: As above.
        commit_description: As above.
        tags: As above.
        model_tags: Tags that transformers gave the model; they go into a card that is written.
        remove: Files of the repository that the same commit removes, where they exist.

    Raises:
        ValueError: There is no card that ``tags`` could go into, ``private`` is not what the repository is, or it holds
            an adapter and the folder whole weights, or the reverse.
    """
    files = publishable(folder)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private is not None and bool(api.model_info(repo_id).private) is not private:
        raise OpenVLAValueError(
            f"{repo_id} exists and is {'public' if private else 'private'}; private={private} is for a new repository. "
            "Change it in its settings on the Hub, or leave private out. Nothing was uploaded."
        )
    if revision is not None and not create_pr and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    existing = set(api.list_repo_files(repo_id, revision=revision))
    _require_same_kind(files, existing, repo_id)
    stale = {*remove}
    if SINGLE_FILE in files or INDEX_FILE in files:  # weights of another layout would be loaded in their place
        stale |= {name for name in existing if name in (SINGLE_FILE, INDEX_FILE) or SHARD.fullmatch(name)}
    card = _updated_card(api, files, repo_id, revision, tags, model_tags)
    operations: list[Any] = [
        CommitOperationAdd(name, str(path)) for name, path in files.items() if card is None or name != CARD_FILE
    ]
    operations += [CommitOperationDelete(name) for name in sorted(stale & existing - {*files})]
    if card is not None:
        operations.append(CommitOperationAdd(CARD_FILE, str(card).encode()))
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def _require_same_kind(files: Iterable[str], existing: set[str], repo_id: str) -> None:
    """Raise ValueError where an adapter would lie beside whole weights in the repository, or the reverse."""
    weights, adapter = {*LAYOUTS}, {ADAPTER_CONFIG_FILE}
    kind, other_kind = (weights, adapter) if weights & {*files} else (adapter, weights)
    if kind & {*files} and other_kind & existing:
        raise OpenVLAValueError(
            f"{repo_id} holds {min(other_kind & existing)}, which could not be told from {min(kind & {*files})}: an "
            "adapter and whole weights need a repository or a branch each. Give another one. Nothing was uploaded."
        )


def _updated_card(
    api: HfApi,
    files: dict[str, Path],
    repo_id: str,
    revision: str | None,
    tags: list[str] | None,
    model_tags: list[str] | None,
) -> ModelCard | None:
    """Return the card to upload: a new one where there is none, or the existing one with ``tags``; else None."""
    exists = CARD_FILE in files or api.file_exists(repo_id, CARD_FILE, revision=revision)
    if not exists and "config.json" in files:
        card = ModelCard(model_card(json.loads(files["config.json"].read_text(encoding="utf-8")), repo_id))
        new_tags = [*(tags or []), *(model_tags or [])]
    elif tags and exists:
        card = ModelCard.load(files.get(CARD_FILE) or api.hf_hub_download(repo_id, CARD_FILE, revision=revision))
        new_tags = tags
    elif tags:
        raise OpenVLAValueError(
            f"tags go into a model's card, and {repo_id} has none; push the model first, or leave them out."
        )
    else:
        return None
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *new_tags]))
    return card


def publishable(folder: str | os.PathLike) -> dict[str, Path]:
    """Return every file to upload: name in the repository to path.

    Hidden files, formats that can run code, and shards that transformers would not load are left out.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    unused = unused_weights(names)
    return {
        name: path
        for name, path in names.items()
        if not any(part.startswith((".", "__pycache__")) for part in name.split("/"))
        and path.suffix not in UNSAFE_SUFFIXES
        and name not in unused
    }


def unused_weights(names: Iterable[str]) -> list[str]:
    """Return the files of a folder that are weights and not loaded by transformers: shards beside model.safetensors."""
    names = list(names)
    return [name for name in names if name == INDEX_FILE or SHARD.fullmatch(name)] if SINGLE_FILE in names else []


def model_card(config: dict[str, Any], name: str) -> str:
    """Return the text of a model card, with one table a dataset of the action's dimensions.

    Args:
        config: The content of config.json.
        name: Name of the model, or its repository.
    """
    language_model = config.get("hf_llm_id") or config["llm_backbone_id"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: robotics",
        "tags: [robotics, vision-language-action, openvla, custom_code]",
        "---",
        f"# {name}",
        "",
        f"{config['architectures'][0]}: {config['vision_backbone_id']}, {language_model}. Loads with",
        "`trust_remote_code=True`, or after `import openvla`.",
    ]
    if config.get("action_vq"):
        chunk, vq = f"{config['chunk_length']} x {config['action_dim']}", config["action_vq"]
        lines += [
            "",
            f"MiniVLA: {vq['num_rounds']} tokens, each one of {vq['num_codes']} codes, are a chunk of {chunk} numbers.",
        ]
        lines += ["", VQ_LICENSE_NOTE]
    if config.get("image_sequence_len"):
        wrist = ", each moment's main and wrist image" if config.get("use_wrist_image") else ""
        lines += ["", f"Takes {config['image_sequence_len']} images, the oldest moment first{wrist}."]
    if config.get("parallel_decoding"):
        lines += ["", _chunk_description(config)]
    if config.get("trace_prompting"):
        lines += [
            "",
            "TraceVLA: takes the camera's frame and the frame with traces of moving points drawn on it, or the frame",
            "alone where there is no trace.",
        ]
    low, high = NORMALIZATIONS[config.get("normalization", "q99")]
    for key, statistics in (config.get("norm_stats") or {}).items():
        action = statistics["action"]
        mask = action.get("mask") or [True] * len(action[low])
        lines += [
            "",
            f"## Actions of `{key}`",
            "",
            f"| dimension | unit | {low} | {high} | normalised |",
            "|---|---|---|---|---|",
        ]
        dimensions = zip(dimension_labels(len(mask), key), action[low], action[high], mask)
        for (label, unit), lowest, highest, is_normalized in dimensions:
            normalized = "yes" if is_normalized else "no"
            lines.append(f"| {label} | {unit} | {lowest:.6g} | {highest:.6g} | {normalized} |")
    return "\n".join(lines) + "\n"


def _chunk_description(config: dict[str, Any]) -> str:
    """Describe inputs and outputs of a model with parallel decoding, in words."""
    head = config.get("action_head") or "tokens"
    film = ", FiLM" if config.get("use_film") else ""
    chunk = f"{config.get('chunk_length', 1)} x {config['action_dim']}"
    inputs = f"{config.get('num_images_in_input', 1)} image(s) of one moment and an instruction"
    if config.get("proprio_dim"):
        inputs += f", and `proprio=`, the robot's state in its own units ({config['proprio_dim']} numbers)"
    return f"OpenVLA-OFT ({head}{film}): takes {inputs}; predicts a chunk of {chunk} numbers."
