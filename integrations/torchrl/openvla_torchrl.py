"""OpenVLA checkpoints of the ``openvla`` package as a policy of TorchRL (0.14.1).

Copy this file beside your script, or put its folder on PYTHONPATH:

    policy = OpenVLAWrapper.from_pretrained(FOLDER, unnorm_key="libero_spatial_no_noops", robot_convention="libero",
                                            temperature=1.6, mode="sample", log_probs_mode="token")
    loss = ClipPPOLoss(actor_network=policy, critic_network=None, entropy_bonus=False)
    loss.set_keys(action=policy.tensor_keys.action_tokens, sample_log_prob=policy.tensor_keys.log_probs)

``policy.action_tokenizer`` decodes tokens for ``ActionTokenizerTransform``; a policy with ``output_mode="both"`` too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from openvla import AutoModelForVision2Seq, AutoProcessor, observation_batch
from openvla.compatibility_openvla import DTYPE_FIELD
from openvla.errors_openvla import OpenVLAValueError
from openvla.inference.robot_conventions import convert_action, robot_convention
from openvla.inference.sampling import action_log_distribution, sample_actions
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType
from tensordict.nn.probabilistic import interaction_type
from torchrl.data.vla.tokenizers import ActionTokenizerBase
from torchrl.modules.vla.common import VLAWrapperBase


class OpenVLAActionTokenizer(ActionTokenizerBase):
    """Decoder of a model's action tokens, numbered from 0, to a robot's commands.

    Args:
        model: OpenVLA whose statistics give robot units.
        unnorm_key: Dataset of these statistics.
        convention: Robot or simulator, a key of ``ROBOT_CONVENTIONS``; "raw" leaves actions as in the dataset.

    Raises:
        OpenVLAValueError: The convention is unknown.
    """

    def __init__(self, model: Any, unnorm_key: str | None, convention: str) -> None:
        super().__init__()
        robot_convention(convention)
        self.convention, self.statistics = convention, model.action_statistics(unnorm_key)
        self.first, self.bins = model.action_token_ids.start, model.action_tokenizer
        self.size = model.action_token_ids.stop - self.first

    @property
    def vocab_size(self) -> int:
        """Number of action tokens."""
        return self.size

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return commands ``(..., action_dim)`` of tokens ``(..., action_dim)``.

        They are computed in float64 and returned in float32, the dtype of TorchRL's action specifications.
        """
        actions = self.statistics.unnormalize(self.bins.decode(tokens.cpu().numpy() + self.first))
        if self.convention != "raw":
            # A drawn gripper may be any bin; training data have 0 (closed) to 1 (open).
            actions[..., -1] = actions[..., -1].clip(0, 1)
            actions = convert_action(actions.reshape(-1, actions.shape[-1]), self.convention).reshape(actions.shape)
        return torch.from_numpy(actions).to(tokens.device, torch.float32)


class OpenVLAWrapper(VLAWrapperBase):
    """OpenVLA as TorchRL's policy of action tokens ``(..., chunk, action_dim)``, numbered from 0.

    It reads TorchRL's canonical keys: the image, uint8 ``(..., 3, height, width)``; a model of two cameras also
    ``("observation", "wrist_image")``; a model with proprio also the state ``(..., proprio_dim)`` in robot units; and
    the instruction. The distribution is that of ``openvla``'s ``sample_actions``. ``get_dist`` of a model that predicts
    token by token needs the tokens in the tensordict: each position is given the ones before it.

    Args:
        model: OpenVLA that predicts tokens.
        processor: Processor of the checkpoint.
        unnorm_key: Dataset whose statistics give robot units; not needed if the model has one.
        robot_convention: Of the environment, see ``OpenVLAActionTokenizer``.
        temperature: Logits are divided by it, in rollouts and in the loss.
        top_k: Number of likeliest tokens to draw from; None for all action tokens.
        pad_to: Length of every prompt in tokens; None pads to the longest of a batch.
        **kwargs: Of ``VLAWrapperBase``, such as ``log_probs_mode``, ``output_mode``, ``mode``.

    Raises:
        OpenVLAValueError: The model has no distribution of one token for each action number, or ``num_samples`` with a
            model that predicts token by token.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        robot_convention: str,
        unnorm_key: str | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        pad_to: int | None = None,
        **kwargs: Any,
    ) -> None:
        if model.config.action_head is not None or model.config.action_vq is not None:
            raise OpenVLAValueError(
                "TorchRL's policies of tokens need one token for each action number: no continuous head, no VQ actions."
            )
        if kwargs.get("num_samples") is not None and not model.config.parallel_decoding:
            raise OpenVLAValueError(
                "num_samples needs a model with parallel decoding; repeat the observations instead."
            )
        unnorm_key = model.batch_keys(unnorm_key, 1)[0]
        tokenizer = OpenVLAActionTokenizer(model, unnorm_key, robot_convention)
        super().__init__(
            model,
            processor=processor,
            action_dim=tokenizer.statistics.dimension,
            chunk_size=model.config.chunk_length,
            action_head="tokens",
            vocab_size=tokenizer.vocab_size,
            action_tokenizer=tokenizer,
            use_state=model.config.proprio_dim is not None,
            **kwargs,
        )
        self.unnorm_key, self.temperature, self.top_k, self.pad_to = unnorm_key, temperature, top_k, pad_to

    @classmethod
    def from_pretrained(cls, folder: str, *, dtype: torch.dtype | str = "auto", **kwargs: Any) -> OpenVLAWrapper:
        """Load a checkpoint of a folder or the Hub in eval mode; ``kwargs`` are the class's."""
        model = AutoModelForVision2Seq.from_pretrained(folder, **{DTYPE_FIELD: dtype}).eval()
        return cls(model, AutoProcessor.from_pretrained(folder), **kwargs)

    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        tensordict_out: TensorDictBase | None = None,
        logits_only: bool = False,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Write sampled tokens, or the likeliest, as the exploration type says, and their log-probabilities."""
        if self.model.config.parallel_decoding or logits_only or self.logits_only:
            return super().forward(tensordict, tensordict_out=tensordict_out, logits_only=logits_only, **kwargs)
        tokens = self._draw(tensordict)
        logits = self._action_logits(tensordict.clone(recurse=False).set(self.tensor_keys.action_tokens, tokens))
        out = TensorDict({}, batch_size=tokens.shape[:-2], device=tokens.device)
        self._set_action(
            out,
            chunk=self.action_tokenizer.decode(tokens) if self.output_mode in ("chunk", "both") else None,
            tokens=tokens if self.output_mode in ("tokens", "both") else None,
            logits=logits if self.return_logits else None,
            log_probs=self._dist_from_logits(logits).log_prob(tokens) if self.return_log_probs else None,
        )
        return self._output_tensordict(tensordict, out, tensordict_out)

    def _action_logits(self, tensordict: TensorDictBase) -> torch.Tensor:
        """Return the log-probabilities of all action tokens, float32 ``(..., chunk, action_dim, vocab_size)``."""
        tokens = None
        if not self.model.config.parallel_decoding:
            tokens = tensordict.get(self.tensor_keys.action_tokens, None)
            if tokens is None:
                raise OpenVLAValueError(
                    f"The model predicts token by token: its distribution needs {self.tensor_keys.action_tokens}."
                )
            tokens = tokens.reshape(-1, self.action_dim) + self.action_tokenizer.first
        inputs, batch = self._inputs(tensordict)
        logits = action_log_distribution(
            self.model, **inputs, tokens=tokens, temperature=self.temperature, top_k=self.top_k
        )
        return logits.reshape(*batch, self.chunk_size, self.action_dim, self.vocab_size)

    def _draw(self, tensordict: TensorDictBase) -> torch.Tensor:
        """Return sampled tokens, or the likeliest, as the exploration type says: int64 ``(..., 1, action_dim)``."""
        inputs, batch = self._inputs(tensordict)
        if (interaction_type() or self.default_interaction_type) == InteractionType.RANDOM:
            _, tokens, _ = sample_actions(self.model, **inputs, temperature=self.temperature, top_k=self.top_k)
        else:
            output = self.model.predict_action(**inputs, constrain_actions=True, return_dict=True, strict=True)
            tokens = torch.as_tensor(output.token_ids, device=self.model.device)
        return (tokens - self.action_tokenizer.first).reshape(*batch, self.chunk_size, self.action_dim)

    def _inputs(self, tensordict: TensorDictBase) -> tuple[dict[str, Any], torch.Size]:
        """Return the model's inputs for a tensordict, and its batch shape."""
        image = self._get_image(tensordict)
        views = [image]
        if self.processor.num_images_in_input > 1:
            views.append(tensordict.get(self.tensor_keys.wrist_image))
        views = [np.moveaxis(view.reshape(-1, *view.shape[-3:]).cpu().numpy(), 1, -1) for view in views]
        frames = [list(images) if len(images) > 1 else images[0] for images in zip(*views)]
        instructions = _flat(self._get_instruction(tensordict))
        if len(instructions) == 1:
            instructions *= len(frames)
        state = self._get_state(tensordict).reshape(len(frames), -1).cpu() if self.use_state else None
        inputs = observation_batch(self.processor, frames, instructions, state, pad_to=self.pad_to)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return {**inputs, "unnorm_key": self.unnorm_key}, image.shape[:-3]

    def _update_keys(self) -> None:
        """Add the second camera to ``in_keys``."""
        super()._update_keys()
        if self.processor.num_images_in_input > 1:
            self.in_keys = [*self.in_keys, self.tensor_keys.wrist_image]


def _flat(instruction: Any) -> list[str]:
    """Return the instructions of a string, a ``NonTensorData`` or a nested ``NonTensorStack`` as one list."""
    if isinstance(instruction, str):
        return [instruction]
    if not isinstance(instruction, list):
        return _flat(instruction.tolist())
    return [text for part in instruction for text in _flat(part)]
