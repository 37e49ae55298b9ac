"""OpenVLA: one camera image and an instruction in, one robot action out.

One action, in order: ``predict_action`` aligns the prompts and appends the empty token, ``embed_inputs`` runs the
towers and puts the patches after each row's BOS, ``decode_greedily`` picks one token per action dimension,
``ActionTokenizer`` turns tokens into bin centres and ``NormalizationStatistics`` stretches them to robot units.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationMixin
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .actions_openvla import ActionTokenizer, NormalizationStatistics, nearest_name, validate_norm_stats
from .adapter_files_openvla import adapter_source, base_of, base_record, optional_file, revision_of
from .adapters_openvla import LoraMixin
from .configuration_openvla import OpenVLAConfig, write_json
from .decoding_openvla import append_token, decode_greedily, only, positions_of, require_finite, require_whole_actions
from .prismatic_openvla import PrismaticForConditionalGeneration
from .publishing_openvla import PushToHub  # noqa: F401
from .quantization_openvla import is_quantized
from .vision_openvla import PrismaticVisionBackbone  # noqa: F401  transformers up to 5.8 copies direct imports only

logger = logging.get_logger(__name__)

STATISTICS_FILE = "dataset_statistics.json"
# generate() keywords with which predict_action decodes greedily by itself; any other goes to transformers' generate.
GREEDY_KEYWORDS = {"do_sample", "num_beams", "use_cache", "eos_token_id"}


@dataclass
class ActionOutput(ModelOutput):
    """What ``predict_action(..., return_dict=True)`` gives; without the batch axis for one row.

    Attributes:
        actions: float64 ``(batch, action_dim)``, robot units.
        normalized_actions: float64 ``(batch, action_dim)``, bin centres in (-1, 1).
        token_ids: int64 ``(batch, action_dim)``.
        bin_probabilities: float64 ``(batch, action_dim, n_action_bins - 1)``: softmax over the action tokens alone,
            aligned with ``ActionTokenizer.bin_centers``; sums to 1.
        entropy: float64 ``(batch, action_dim)``, of those probabilities, in nats; 0 is certain, 5.54 is uniform.
    """

    actions: np.ndarray | None = None
    normalized_actions: np.ndarray | None = None
    token_ids: np.ndarray | None = None
    bin_probabilities: np.ndarray | None = None
    entropy: np.ndarray | None = None


class OpenVLAForActionPrediction(LoraMixin, PrismaticForConditionalGeneration, GenerationMixin):
    """OpenVLA: one camera image and an instruction in, one robot action out."""

    config_class = OpenVLAConfig

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        self.action_tokenizer = ActionTokenizer(config.vocab_size, config.n_action_bins)
        self.bins, self.bin_centers = self.action_tokenizer.bins, self.action_tokenizer.bin_centers
        self.vocab_size = config.vocab_size

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load a checkpoint, and the action statistics that lie beside its weights in dataset_statistics.json.

        The file adds to the statistics in config.json and wins where both have a key; where it holds one key, that
        key becomes the default. An adapter (LoRA) is loaded on top of the base that it names.
        """
        adapter, hub = adapter_source(pretrained_model_name_or_path, kwargs)
        if adapter is not None:
            return cls._from_adapter(adapter, hub, kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            model._read_statistics(pretrained_model_name_or_path, hub)
            # Part of an adapter's record of its base; from 5.2x on transformers does not keep it.
            model.config._commit_hash = revision_of(pretrained_model_name_or_path, hub)
        return loaded

    @classmethod
    def _from_adapter(cls, adapter: str | os.PathLike, hub: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        config = kwargs.pop("config", None)  # that an Auto class read, of the adapter or the base; the base has its own
        if getattr(config, "_attn_implementation_internal", None):
            kwargs.setdefault("attn_implementation", config._attn_implementation_internal)
        base, kwargs["revision"] = base_of(adapter, hub)
        for name in ("subfolder", "_commit_hash"):  # of the adapter
            kwargs.pop(name, None)
        loaded = cls.from_pretrained(base, **{name: value for name, value in kwargs.items() if value is not None})
        (loaded[0] if isinstance(loaded, tuple) else loaded).load_lora(adapter, **hub)
        return loaded

    def _read_statistics(self, name_or_path: str | os.PathLike, hub: dict[str, Any]) -> None:
        file = optional_file(name_or_path, STATISTICS_FILE, hub)
        if file is None:
            return
        try:
            self.config.merge_statistics(json.loads(Path(file).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(
                f"{STATISTICS_FILE} beside the weights of {name_or_path} is not usable: {error}"
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> Any:
        """Save weights, configuration, code and, in dataset_statistics.json, the action statistics.

        A model with an adapter saves the adapter; ``merge_lora()`` first for whole weights.
        """
        if is_main_process and self.norm_stats and not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            write_json(Path(save_directory) / STATISTICS_FILE, self.norm_stats)
        if self._lora is not None:
            return self.save_lora(save_directory, kwargs.get("state_dict")) if is_main_process else None
        if is_quantized(self):  # so that an adapter trained on the saved folder still knows its base
            self.config.quantized_from = base_record(self)
        return super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    @property
    def norm_stats(self) -> dict[str, dict[str, Any]]:
        """Action statistics by dataset key; assigning checks and replaces all of them."""
        return self.config.norm_stats or {}

    @norm_stats.setter
    def norm_stats(self, norm_stats: dict[str, dict[str, Any]]) -> None:
        validate_norm_stats(norm_stats)
        self.config.norm_stats = norm_stats
        if self.config.default_unnorm_key not in norm_stats:
            self.config.default_unnorm_key = None

    def add_norm_stats(self, key: str, stats: dict[str, Any]) -> None:
        """Add (or replace) one dataset's statistics; they are saved with the model.

        Args:
            key: The name that ``unnorm_key`` will take.
            stats: ``{"action": {"q01": [...], "q99": [...], "mask": [...]}}`` or just the inner dictionary.

        Raises:
            ValueError: The statistics are inconsistent, not finite or inverted.
        """
        stats = stats if "action" in stats else {"action": stats}
        self.norm_stats = {**self.norm_stats, key: stats}

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Number of action dimensions of a dataset."""
        return NormalizationStatistics(self.get_action_stats(unnorm_key)).dimension

    def get_action_stats(self, unnorm_key: str | None = None) -> dict[str, Any]:
        """The action statistics of a dataset; raises as ``resolve_unnorm_key`` does."""
        return self.norm_stats[self.resolve_unnorm_key(unnorm_key)]["action"]

    def resolve_unnorm_key(self, unnorm_key: str | None = None) -> str:
        """The dataset whose statistics are used for a given (or no) key.

        Raises:
            KeyError: The key is unknown; the message names the nearest and all known ones.
            ValueError: No key is given although there are several datasets and no default, or none at all.
        """
        known = list(self.norm_stats)
        if not known:
            raise ValueError(
                "This model has no action statistics, so actions cannot be un-normalised; add them with "
                "model.add_norm_stats(key, statistics) or put dataset_statistics.json beside the weights."
            )
        if unnorm_key is None:
            unnorm_key = known[0] if len(known) == 1 else self.config.default_unnorm_key
        if unnorm_key is None:
            raise ValueError(f"The model knows several datasets; pass unnorm_key, one of {known}.")
        if unnorm_key not in known:
            nearest = nearest_name(unnorm_key, known)
            hint = f" Did you mean {nearest!r}?" if nearest else ""
            raise KeyError(f"Unknown unnorm_key {unnorm_key!r}.{hint} Known: {known}.")
        return unnorm_key

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        unnorm_key: str | Sequence[str | None] | None = None,
        *,
        return_dict: bool = False,
        constrain_actions: bool = False,
        **generate_kwargs: Any,
    ) -> np.ndarray | ActionOutput:
        """The robot action for an image and a prompt.

        Args:
            input_ids: int64 ``(batch, length)``, padded on either side; the empty token is appended where missing.
            pixel_values: float ``(batch, 3 or 6, size, size)``, one image a prompt.
            attention_mask: ``(batch, length)``; may be left out when there is no padding.
            unnorm_key: Whose statistics give robot units: one key, or one a row. None: the only or default one.
            return_dict: Give an :class:`ActionOutput` with tokens, bin probabilities and entropy.
            constrain_actions: Let the model choose among action tokens only.
            **generate_kwargs: Of ``generate`` (sampling, beams, ...); greedy without. With
                ``num_return_sequences=n`` each row gives n consecutive rows.

        Returns:
            float64 ``(action_dim,)`` for one row, ``(batch, action_dim)`` for several, in the units of the dataset
            (OpenVLA's robots: metres, radians, gripper 0 closed to 1 open).

        Raises:
            ValueError: Inputs are missing or contradict each other, logits are not finite, or the model ended the
                sequence before every dimension had its token.
            KeyError: Unknown ``unnorm_key``.
        """
        if input_ids is None or pixel_values is None:
            raise ValueError(
                "predict_action needs input_ids and pixel_values; without the image it would guess blindly."
            )
        if "max_new_tokens" in generate_kwargs or "max_length" in generate_kwargs:
            raise ValueError("predict_action generates one token a dimension; leave out max_new_tokens and max_length.")
        input_ids, attention_mask = self._prompts(input_ids, attention_mask)
        statistics = self._row_statistics(unnorm_key, len(input_ids))
        action_dim = statistics[0].dimension
        embeds, mask, _, _ = self.embed_inputs(input_ids, pixel_values, attention_mask)
        end_ids = generate_kwargs.pop("eos_token_id", self.generation_config.eos_token_id)
        allowed = self.action_token_ids if constrain_actions else None
        sampled = generate_kwargs.get("do_sample") or (generate_kwargs.get("num_beams") or 1) > 1
        if set(generate_kwargs) <= GREEDY_KEYWORDS and not sampled:
            use_cache = generate_kwargs.get("use_cache") is not False
            tokens, logits = decode_greedily(self.language_model, embeds, mask, action_dim, end_ids, allowed, use_cache)
        else:
            if return_dict and (generate_kwargs.get("num_beams") or 1) > 1:
                raise ValueError("Bin probabilities are not defined for beam search; drop num_beams or return_dict.")
            if allowed is not None:
                processors = generate_kwargs.get("logits_processor") or []
                generate_kwargs["logits_processor"] = [*processors, lambda _, scores: only(scores, allowed)]
            generate_kwargs.update(eos_token_id=end_ids, max_new_tokens=action_dim)
            generate_kwargs.update(return_dict_in_generate=True, output_logits=return_dict)
            output = self._generate_from(embeds, mask, generate_kwargs)
            tokens = output.sequences
            logits = torch.stack(output.logits, dim=1).float() if return_dict else None
            require_whole_actions(tokens, action_dim, end_ids)
        statistics = [row for row in statistics for _ in range(len(tokens) // len(statistics))]
        return self._decoded(tokens, logits, statistics, return_dict)

    @torch.no_grad()
    def score_actions(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        actions: np.ndarray | Sequence[Any] | None = None,
        unnorm_key: str | Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """Log-probability that the model would have answered with each candidate action: rank or reject candidates.

        Args:
            input_ids: As in ``predict_action``.
            pixel_values: As in ``predict_action``.
            attention_mask: As in ``predict_action``.
            actions: Robot units, ``(candidates, action_dim)`` for every row or ``(batch, candidates, action_dim)``.
            unnorm_key: As in ``predict_action``.

        Returns:
            float64 ``(batch, candidates)``: the sum over dimensions of the log-probability of the candidate's token
            given the tokens before it, in nats, over the whole vocabulary.

        Raises:
            ValueError: Shapes disagree or values are not finite.
            KeyError: Unknown ``unnorm_key``.
        """
        if input_ids is None or pixel_values is None or actions is None:
            raise ValueError("score_actions needs input_ids, pixel_values and actions.")
        input_ids, attention_mask = self._prompts(input_ids, attention_mask)
        statistics = self._row_statistics(unnorm_key, len(input_ids))
        candidates = np.asarray(actions, dtype=np.float64)
        if candidates.ndim == 2:
            candidates = np.broadcast_to(candidates, (len(input_ids), *candidates.shape))
        if candidates.ndim != 3 or len(candidates) != len(input_ids) or candidates.shape[1] == 0:
            raise ValueError(
                f"actions must have shape (candidates, action_dim) or ({len(input_ids)}, candidates, action_dim) with "
                f"at least one candidate, got {np.shape(actions)}."
            )
        tokens = np.stack([self.action_tokenizer.encode(s.normalize(c)) for s, c in zip(statistics, candidates)])
        embeds, mask, _, _ = self.embed_inputs(input_ids, pixel_values, attention_mask)
        _, count, action_dim = tokens.shape
        tokens = torch.from_numpy(tokens).to(embeds.device).flatten(0, 1)
        embeds = embeds.repeat_interleave(count, dim=0)
        embeds = torch.cat([embeds, self.get_input_embeddings()(tokens[:, :-1]).to(embeds.dtype)], dim=1)
        if mask is not None:
            mask = mask.repeat_interleave(count, dim=0)
            mask = torch.cat([mask, mask.new_ones(len(mask), action_dim - 1)], dim=1)
        output = self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=None if mask is None else positions_of(mask),
            use_cache=False,
            return_dict=True,
        )
        # The logits at the prompt's last position and at all action tokens but the last one.
        logits = require_finite(output.logits[:, -action_dim:].float())
        chosen = logits.log_softmax(-1).gather(-1, tokens.to(logits.device)[..., None]).squeeze(-1)
        return chosen.cpu().double().sum(-1).view(-1, count).numpy()

    def _row_statistics(
        self, unnorm_key: str | Sequence[str | None] | None, rows: int
    ) -> list[NormalizationStatistics]:
        keys = [unnorm_key] * rows if unnorm_key is None or isinstance(unnorm_key, str) else list(unnorm_key)
        if len(keys) != rows:
            raise ValueError(f"Got {len(keys)} unnorm_keys for a batch of {rows}; give one, or one a row.")
        statistics = [NormalizationStatistics(self.get_action_stats(key)) for key in keys]
        dimensions = {row.dimension for row in statistics}
        if len(dimensions) > 1:
            raise ValueError(f"One batch cannot mix action dimensions {sorted(dimensions)}; call once for each.")
        return statistics

    def _prompts(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.LongTensor, torch.LongTensor | None]:
        """Left-padded prompts as trained on: ending in the empty token."""
        input_ids, attention_mask = self._aligned(input_ids, attention_mask)
        if self.config.empty_token_id is None:
            return input_ids, attention_mask
        return append_token(input_ids, attention_mask, self.config.empty_token_id, self.pad_token_id)

    @property
    def action_token_ids(self) -> slice:
        """The ids that are action tokens: the last ``n_action_bins`` of the unpadded vocabulary."""
        return slice(self.action_tokenizer.first_token_id, self.action_tokenizer.vocab_size)

    def _decoded(
        self,
        tokens: torch.LongTensor,
        logits: torch.FloatTensor | None,
        statistics: list[NormalizationStatistics],
        return_dict: bool,
    ) -> np.ndarray | ActionOutput:
        """Tokens ``(batch, action_dim)`` as actions in robot units, and what was behind them when asked for."""
        token_ids = tokens.cpu().numpy()
        normalized = self.action_tokenizer.decode(token_ids)
        actions = np.stack([row.unnormalize(values) for row, values in zip(statistics, normalized)])
        outside = int((token_ids < self.action_token_ids.start).sum() + (token_ids >= self.action_token_ids.stop).sum())
        if outside:
            logger.warning_once(
                f"{outside} of {token_ids.size} predicted tokens are not action tokens; they decode to the extreme "
                "bins, as in the reference. If this checkpoint was trained, check that prompt and image fit it; "
                "constrain_actions=True rules such tokens out. (Said once.)"
            )
        single = len(actions) == 1
        if not return_dict:
            return actions[0] if single else actions
        # Ids count down as bins count up; the top edge's token shares the last bin.
        by_bin = logits[..., self.action_token_ids].cpu().double().softmax(-1).flip(-1).numpy()
        probabilities = by_bin[..., :-1].copy()
        probabilities[..., -1] += by_bin[..., -1]
        entropy = -(probabilities * np.log(np.where(probabilities > 0, probabilities, 1.0))).sum(-1)
        values = (actions, normalized, token_ids, probabilities, entropy)
        return ActionOutput(*(value[0] if single else value for value in values))
