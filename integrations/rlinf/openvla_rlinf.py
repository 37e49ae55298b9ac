"""OpenVLA checkpoints of the ``openvla`` package as a model type of RLinf (0.3.0), ``openvla_hf``.

Put this file's folder on PYTHONPATH and name it:

    export RLINF_EXT_MODULE=openvla_rlinf

RLinf then calls ``register()`` in every worker. The model's configuration (``actor.model`` in RLinf's YAML):

    model_type: openvla_hf
    model_path: FOLDER          # a checkpoint or a repository of the Hub that the openvla package loads
    precision: bf16
    is_lora: false
    action_dim: 7               # checked: the model's own
    num_action_chunks: 8        # checked: the model's own, 1 for a model without chunks
    unnorm_key: libero_spatial_no_noops
    robot_convention: libero    # of the environment (openvla.inference.robot_conventions); raw leaves actions
    max_prompt_length: 64       # tokens; every prompt is padded to it
    add_value_head: false       # true for PPO

The name is none of RLinf's own types (``openvla``, ``openvla_oft``): for these RLinf imports timm and ``prismatic``
when it wraps the model for FSDP, and its environments convert the gripper once more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from openvla import AutoProcessor, OpenVLAForActionPrediction, observation_batch
from openvla.compatibility_openvla import DTYPE_FIELD
from openvla.errors_openvla import OpenVLAValueError
from openvla.inference.robot_conventions import convert_action, robot_convention
from openvla.inference.sampling import action_log_probs, sample_actions
from rlinf.models import register_model
from rlinf.models.embodiment.base_policy import BasePolicy, ForwardType
from rlinf.models.embodiment.modules.value_head import ValueHead
from torch import nn

MODEL_TYPE = "openvla_hf"
VALUE_HEAD_WIDTHS = (512, 128)  # of RLinf's own OpenVLA models
# What ``forward_inputs`` hold beside the model's inputs. RLinf's actor gives temperature and top_k to its own types
# alone, so they travel with the samples.
TOKENS, TEMPERATURE, TOP_K = "action_tokens", "temperature", "top_k"
# float64 that travel as the int64 of the same bits: FSDP casts floating inputs to its param_dtype.
EXACT_NUMBERS = {TEMPERATURE, "proprio"}


def register() -> None:
    """Register the model type with RLinf, which calls this in every worker."""
    register_model(MODEL_TYPE, build_model, category="embodied", force=True)


def build_model(cfg: DictConfig, torch_dtype: torch.dtype | None) -> OpenVLAForRLinf:
    """Load the model of a configuration.

    Args:
        cfg: RLinf's ``actor.model``.
        torch_dtype: Of ``cfg.precision``; None for the checkpoint's own.

    Raises:
        OpenVLAValueError: The configuration does not fit the checkpoint.
    """
    loading: dict[str, Any] = {DTYPE_FIELD: torch_dtype or "auto"}
    if cfg.get("attn_implementation"):
        loading["attn_implementation"] = cfg.attn_implementation
    model = OpenVLAForRLinf.from_pretrained(cfg.model_path, **loading)
    model.configure(cfg, AutoProcessor.from_pretrained(cfg.model_path))
    return model


def build_value_head(hidden_size: int) -> ValueHead:
    """Return a new value head as RLinf's own OpenVLA models have it: with GELU, which RLinf 0.3.0 cannot initialise."""
    head = ValueHead(hidden_size, VALUE_HEAD_WIDTHS, activation="relu")
    for index, layer in enumerate(head.mlp):
        if isinstance(layer, nn.ReLU):
            head.mlp[index] = nn.GELU()
    return head


class OpenVLAForRLinf(OpenVLAForActionPrediction, BasePolicy):
    """An OpenVLA with RLinf's interface of a policy.

    Attributes:
        value_head: RLinf's value head on the hidden state that predicts the first action token; only with
            ``add_value_head``.
    """

    def configure(self, cfg: DictConfig, processor: Any) -> None:
        """Take over what RLinf's configuration says of the model.

        Raises:
            OpenVLAValueError: It does not fit the checkpoint.
        """
        self.unnorm_key = self.batch_keys(cfg.get("unnorm_key"), 1)[0]
        statistics = self.action_statistics(self.unnorm_key)
        expected = {"action_dim": statistics.dimension, "num_action_chunks": self.config.chunk_length}
        for name, value in expected.items():
            if cfg.get(name) != value:
                raise OpenVLAValueError(f"{name} is {cfg.get(name)}, but {cfg.model_path} has {value}; set it to that.")
        if self.config.action_head is not None:
            raise OpenVLAValueError(
                f"{cfg.model_path} has the continuous head {self.config.action_head!r}, which has no probabilities; "
                "RLinf's PPO and GRPO need a model that predicts tokens."
            )
        if self.config.action_vq is not None:
            raise OpenVLAValueError("RLinf counts one token for each action number; VQ actions have fewer.")
        if cfg.get("value_type", "chunk_level") != "chunk_level":
            raise OpenVLAValueError(f"value_type must be chunk_level (one value a chunk), got {cfg.value_type}.")
        if cfg.get("robot_convention") is None:
            raise OpenVLAValueError(
                "robot_convention is missing: the environment's, such as libero, or raw for actions as in the dataset."
            )
        robot_convention(cfg.robot_convention)
        self.robot_convention = cfg.robot_convention
        self.processor, self.max_prompt_length = processor, cfg.max_prompt_length
        if cfg.add_value_head:
            self.value_head = build_value_head(self.config.text_config.hidden_size).to(self.device, self.dtype)

    def forward(self, *args: Any, forward_type: ForwardType = ForwardType.DEFAULT, **kwargs: Any) -> Any:
        """Evaluate sampled actions if ``forward_inputs`` are given; else run the model as usual."""
        if "forward_inputs" in kwargs:
            return BasePolicy.forward(self, forward_type, **kwargs)
        return super().forward(*args, **kwargs)

    @torch.no_grad()
    def predict_action_batch(
        self,
        env_obs: dict[str, Any],
        calculate_logprobs: bool = True,
        calculate_values: bool = True,
        mode: str = "train",
        do_sample: bool | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        max_new_tokens: int | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Predict the next actions of a batch of environments.

        Args:
            env_obs: RLinf's observations: ``main_images`` uint8 ``(batch, height, width, 3)``, ``wrist_images`` and
                ``extra_view_images`` the same or ``(batch, cameras, height, width, 3)``, ``states``
                ``(batch, proprio_dim)``, ``task_descriptions``. Cameras and states that the model does not take are
                not read.
            calculate_logprobs: Not needed: log-probabilities come with every sample.
            calculate_values: Compute values, if there is a value head.
            mode: "eval" is greedy unless ``do_sample`` is given.
            do_sample: Draw tokens; else take the likeliest action tokens.
            temperature: Of drawing.
            top_k: Of drawing; None, 0 or less for all action tokens.
            top_p: Only 1.0.
            max_new_tokens: Not needed: the model's own number.

        Returns:
            ``actions``: float64 ``(batch, chunk, action_dim)`` in the convention of the environment. The second is
            ``prev_logprobs`` float32 ``(batch, chunk * action_dim)``, ``prev_values`` ``(batch, 1)`` (zeros without
            values), and ``forward_inputs``, arguments of ``default_forward``.

        Raises:
            OpenVLAValueError: ``top_p`` is not 1, or the observations do not fit the model.
        """
        if top_p not in (None, 1.0):
            raise OpenVLAValueError(f"top_p must be 1.0, got {top_p}; use temperature and top_k.")
        inputs = self._model_inputs(env_obs)
        value_head = getattr(self, "value_head", None) if calculate_values else None
        if do_sample if do_sample is not None else mode == "train":
            top_k = _top_k(self, top_k)
            sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "value_head": value_head}
            actions, tokens, log_probs, *values = sample_actions(self, **inputs, unnorm_key=self.unnorm_key, **sampling)
        else:
            temperature, top_k = 1.0, None
            output = self.predict_action(
                **inputs, unnorm_key=self.unnorm_key, constrain_actions=True, return_dict=True, strict=True
            )
            actions, tokens = output.actions, torch.as_tensor(output.token_ids, device=self.device)
            log_probs, _, *values = action_log_probs(
                self, **inputs, unnorm_key=self.unnorm_key, tokens=tokens, value_head=value_head
            )
        batch = len(log_probs)
        forward_inputs = {
            **inputs,
            TOKENS: tokens,
            TEMPERATURE: torch.full((batch,), temperature, dtype=torch.float64),
            TOP_K: torch.full((batch,), top_k or 0),
        }
        for name in EXACT_NUMBERS & forward_inputs.keys():
            forward_inputs[name] = forward_inputs[name].double().view(torch.int64)
        return self._environment_actions(actions), {
            "prev_logprobs": log_probs.flatten(1),
            "prev_values": values[0].float() if values else torch.zeros(batch, 1, device=log_probs.device),
            "forward_inputs": forward_inputs,
        }

    def default_forward(
        self,
        forward_inputs: dict[str, torch.Tensor],
        compute_logprobs: bool = False,
        compute_entropy: bool = False,
        compute_values: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        use_cache: bool = False,
    ) -> dict[str, torch.Tensor | None]:
        """Return log-probabilities, entropies and values of sampled actions, with gradient.

        Args:
            forward_inputs: Of ``predict_action_batch``; rows may be shuffled and split.
            compute_logprobs: Return ``logprobs``.
            compute_entropy: Return ``entropy``.
            compute_values: Return ``values``; needs the value head.
            temperature: None for that of ``forward_inputs``.
            top_k: None for that of ``forward_inputs``; 0 or less for all action tokens.
            use_cache: Not needed: one pass without a cache.

        Returns:
            ``logprobs`` and ``entropy`` float32 ``(batch, chunk * action_dim)``, ``values`` ``(batch, 1)``; None for
            what was not asked for.

        Raises:
            OpenVLAValueError: Values without a value head, or rows of several temperatures or ``top_k``.
        """
        if compute_values and not hasattr(self, "value_head"):
            raise OpenVLAValueError("compute_values needs add_value_head: true in the model's configuration.")
        inputs = dict(forward_inputs)
        for name in EXACT_NUMBERS & inputs.keys():
            inputs[name] = inputs[name].view(torch.float64)
        tokens = inputs.pop(TOKENS)
        sampled_at, sampled_of = _single(inputs.pop(TEMPERATURE), TEMPERATURE), _single(inputs.pop(TOP_K), TOP_K)
        log_probs, entropy, *values = action_log_probs(
            self,
            **inputs,
            unnorm_key=self.unnorm_key,
            tokens=tokens,
            temperature=sampled_at if temperature is None else temperature,
            top_k=_top_k(self, int(sampled_of) if top_k is None else top_k),
            value_head=self.value_head if compute_values else None,
        )
        return {
            "logprobs": log_probs.flatten(1) if compute_logprobs else None,
            "entropy": entropy.flatten(1) if compute_entropy else None,
            "values": values[0].float() if values else None,
        }

    def _model_inputs(self, env_obs: dict[str, Any]) -> dict[str, Any]:
        """Return the model's inputs for RLinf's observations, on its device and in its dtype."""
        given = [env_obs.get(name) for name in ("main_images", "wrist_images", "extra_view_images")]
        views = [torch.as_tensor(images).cpu() for images in given if images is not None]
        views = [images[:, None] if images.ndim == 4 else images for images in views]
        frames = torch.cat(views, dim=1)[:, : self.processor.num_images_in_input].numpy()
        states = torch.as_tensor(env_obs["states"]).cpu() if self.config.proprio_dim is not None else None
        batch = observation_batch(
            self.processor,
            [list(images) if len(images) > 1 else images[0] for images in frames],
            env_obs["task_descriptions"],
            states,
            pad_to=self.max_prompt_length,
        )
        batch["pixel_values"] = batch["pixel_values"].to(self.dtype)
        return {name: torch.as_tensor(value).to(self.device) for name, value in batch.items()}

    def _environment_actions(self, actions: np.ndarray) -> torch.Tensor:
        """Return actions in the environment's convention, ``(batch, chunk, action_dim)``."""
        actions = actions.reshape(len(actions), self.config.chunk_length, -1)
        if self.robot_convention != "raw":
            # A drawn gripper may be any bin; training data have 0 (closed) to 1 (open).
            actions[..., -1] = actions[..., -1].clip(0, 1)
            rows = actions.reshape(-1, actions.shape[-1])
            actions = convert_action(rows, self.robot_convention).reshape(actions.shape)
        return torch.from_numpy(actions)


def _top_k(model: OpenVLAForRLinf, top_k: int | None) -> int | None:
    """Return RLinf's ``top_k``, where 0 or less and more than there are mean all, as ``sample_actions`` takes it."""
    ids = model.action_token_ids
    return top_k if top_k is not None and 0 < top_k < ids.stop - ids.start else None


def _single(values: torch.Tensor, name: str) -> float:
    """Return the one value of all rows; raise OpenVLAValueError if there are several."""
    different = values.unique()
    if len(different) != 1:
        raise OpenVLAValueError(f"One batch holds samples of several {name}: {different.tolist()}.")
    return float(different[0])
