"""What goes up to the Hugging Face Hub: a whole folder, with its card, in one commit."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

from .actions_openvla import NORMALIZATIONS, dimension_labels
from .errors_openvla import OpenVLATypeError, OpenVLAValueError
from .saved_folder_openvla import ADAPTER_CONFIG_FILE, INDEX_FILE, LAYOUTS, SHARD, SINGLE_FILE, unused_weights

CARD_FILE = "README.md"
# Formats that can run code when they are read; nobody should have to trust one, so none is uploaded.
UNSAFE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


class PushToHub:
    """``push_to_hub`` of models and processors, the same on every transformers version."""

    def push_to_hub(
        self,
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
        """Save to a temporary folder and upload all of it in one commit.

        A model takes its weights, code, configuration, statistics and, where the repository has none, a card with the
        action space along; the processor is pushed by itself to the same repository.

        Args:
            repo_id: "name" or "organization/name"; created if it does not exist.
            commit_message: Title of the commit.
            commit_description: Its body.
            private: Whether a new repository is private; None as the account's default, or as it is.
            token: Access token; None takes the one of ``hf auth login``.
            revision: Branch to push to, created if it does not exist; None is main.
            create_pr: Open a pull request instead.
            max_shard_size: Of the weight files.
            tags: For the card, which is written where the repository has none.
            use_temp_dir: None or True, as transformers 4.x takes it.
            safe_serialization: None or True, likewise.
            **unknown: Refused, but for None.

        Returns:
            The commit: its URL, its hash and, with ``create_pr``, the pull request's URL.

        Raises:
            ValueError: ``safe_serialization=False``, ``use_temp_dir=False``, tags and no model, or
                ``private`` of a repository that exists and is not so.
            TypeError: Another argument, such as the ``organization`` and ``use_auth_token`` of old versions.
            huggingface_hub.errors.HfHubHTTPError: The Hub refused, for want of a token or of rights.
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
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                commit_description=commit_description,
                tags=tags,
                model_tags=getattr(self, "model_tags", None),
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
    """Upload a folder in one commit; the arguments are those of :meth:`PushToHub.push_to_hub`.

    ``remove`` names files of the repository that the same commit removes, where they are there. Weights that are
    there in another layout (shards, or one file) are removed too. ``model_tags`` are transformers' own and go into a
    card that is written, as ``tags`` do.

    A folder with a configuration but no card gets one, unless the repository has its own already.

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
    operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    there = set(api.list_repo_files(repo_id, revision=revision))
    own, other = (LAYOUTS, (ADAPTER_CONFIG_FILE,)) if {*LAYOUTS} & {*files} else ((ADAPTER_CONFIG_FILE,), LAYOUTS)
    if {*own} & {*files} and {*other} & there:
        raise OpenVLAValueError(
            f"{repo_id} holds {min({*other} & there)}, which could not be told from {min({*own} & {*files})}: an "
            "adapter and whole weights need a repository or a branch each. Give another one. Nothing was uploaded."
        )
    if SINGLE_FILE in files or INDEX_FILE in files:  # weights of another layout would be loaded in their place
        remove = [*remove, *(name for name in there if name in (SINGLE_FILE, INDEX_FILE) or SHARD.fullmatch(name))]
    operations += [CommitOperationDelete(name) for name in sorted({*remove} & there - {*files})]
    card, written = None, CARD_FILE in files or api.file_exists(repo_id, CARD_FILE, revision=revision)
    if not written and "config.json" in files:
        card = ModelCard(model_card(json.loads(files["config.json"].read_text(encoding="utf-8")), repo_id))
        tags = [*(tags or []), *(model_tags or [])]
    elif tags and written:
        card = ModelCard.load(files.get(CARD_FILE) or api.hf_hub_download(repo_id, CARD_FILE, revision=revision))
    elif tags:
        raise OpenVLAValueError(
            f"tags go into a model's card, and {repo_id} has none; push the model first, or leave them out."
        )
    if card is not None:
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
        operations = [operation for operation in operations if operation.path_in_repo != CARD_FILE]
        operations.append(CommitOperationAdd(CARD_FILE, str(card).encode()))
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def publishable(folder: str | os.PathLike) -> dict[str, Path]:
    """Return name in the repository and path of every file to upload.

    Left out are hidden files, formats that can run code, and shards that transformers would not load.
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


def model_card(config: dict[str, Any], name: str) -> str:
    """The text of a model card, with one table a dataset of what its action's dimensions mean.

    Args:
        config: The content of config.json.
        name: Of the model, or its repository.
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
    if config.get("parallel_decoding"):
        lines += ["", _answer_of(config)]
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
        rows = zip(dimension_labels(len(mask), key), action[low], action[high], mask)
        for (label, unit), lowest, highest, used in rows:
            lines.append(f"| {label} | {unit} | {lowest:.6g} | {highest:.6g} | {'yes' if used else 'no'} |")
    return "\n".join(lines) + "\n"


def _answer_of(config: dict[str, Any]) -> str:
    """What a model that answers in parallel takes and gives, in words."""
    head = config.get("action_head") or "tokens"
    film = ", FiLM" if config.get("use_film") else ""
    chunk = f"{config.get('chunk_length', 1)} x {config['action_dim']}"
    takes = f"{config.get('num_images_in_input', 1)} image(s) of one moment and an instruction"
    if config.get("proprio_dim"):
        takes += f", and `proprio=`, the robot's state in its own units ({config['proprio_dim']} numbers)"
    return f"OpenVLA-OFT ({head}{film}): takes {takes}; answers with a chunk of {chunk} numbers."
