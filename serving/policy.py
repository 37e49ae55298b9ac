"""Batched inference for the policy server. Every request gets the same action that it would get unbatched."""

from __future__ import annotations

import base64
import io
import logging
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from ..configuration_openvla import OpenVLAConfig
from ..dimension_labels import END_EFFECTOR_DIMENSIONS, dimension_labels
from ..errors_openvla import OpenVLAError
from ..inference.batches import Prediction, PreparedObservation, max_batch_size, predict_batch
from ..inference.policy import Policy, stored_bits
from ..quantization_openvla import quantization_name
from .cli import Limits
from .requests import ActRequest, RequestError
from .schemas import ActionDetails, DatasetInfo, PolicyInfo
from .sessions import Sessions

logger = logging.getLogger(__name__)


class PredictionError(RuntimeError):
    """The model failed with an error that is not the client's.

    Attributes:
        id: Identifies the error in the server's log.
    """

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex[:12]
        super().__init__(f"The model failed. The server's log explains it under id {self.id}.")


@dataclass
class PreparedRequest(PreparedObservation):
    """A request as the model takes it.

    Attributes:
        traced_image: The frame with its trace, if the request asked for it and there is one.
    """

    traced_image: Image.Image | None = None


Outcome = Prediction | PredictionError | OpenVLAError


class BatchedPolicy:
    """Predict actions for batches of requests.

    Args:
        policy: The policy.
        name: The model's name for ``/info`` and the log.
        limits: The server's limits.

    Attributes:
        max_batch_size: 1 for a continuous action head: rounding of a batched forward pass would change its actions.
    """

    def __init__(self, policy: Policy, name: str, limits: Limits) -> None:
        self.policy, self.name, self.limits = policy, name, limits
        self.sessions = Sessions(policy, limits.max_sessions)
        self._without_session = policy.without_trace()  # prepares images that need no earlier ones
        self._tokenizer_lock = threading.Lock()  # fast tokenizers raise when two threads use them at once
        self.max_batch_size = max_batch_size(policy.model, limits.max_batch_size)

    def prepare(self, request: ActRequest) -> PreparedRequest:
        """Check a request against the model and run the processor; may be called from several threads.

        Raises:
            RequestError: The request does not fit the model.
        """
        model, config = self.policy.model, self.policy.model.config
        try:
            unnorm_key = model.resolve_unnorm_key(request.unnorm_key or self.policy.unnorm_key)
            action_dim = model.get_action_dim(unnorm_key)
        except OpenVLAError as error:
            raise RequestError(str(error), "unnorm_key") from error
        self._require_images(request)
        self._require_proprio(request, unnorm_key)
        constrain_actions = request.constrain_actions
        if constrain_actions is None:
            constrain_actions = self.policy.constrain_actions
        elif constrain_actions and config.action_head is not None:
            raise RequestError(
                "The model predicts numbers, not tokens; leave constrain_actions out.", "constrain_actions"
            )
        images = self._observe(request)
        is_traced = config.trace_prompting and isinstance(images, list)
        return PreparedRequest(
            inputs=self._process(request, images),
            unnorm_key=unnorm_key,
            proprio=request.proprio,
            action_dim=action_dim,
            details=request.details,
            constrain_actions=constrain_actions,
            traced_image=images[1] if is_traced and request.traced_image else None,
        )

    def _require_images(self, request: ActRequest) -> None:
        """Raise RequestError for a number of images that the model does not take, or a missing or useless session."""
        config, count = self.policy.model.config, len(request.images)
        draws_traces, field = self.policy.visual_trace is not None, request.field_names["image"]
        needed = 1 if config.trace_prompting else config.images_per_moment
        if request.traced_image and not config.trace_prompting:
            raise RequestError("The model is no TraceVLA; leave traced_image out.", "traced_image")
        if request.session is not None:
            if config.history_length == 1 and not draws_traces:
                raise RequestError("The model needs nothing of earlier steps; leave session and step out.", "session")
            if count != needed:
                raise RequestError(
                    f"In a session the model takes {needed} image(s) a step, got {count}; the server has the earlier "
                    "ones. To send all images yourself, leave session and step out.",
                    field,
                )
            return
        if count == config.num_images_in_input or (config.trace_prompting and count == 1 and not draws_traces):
            return
        if count == needed:
            raise RequestError(
                "The model needs images of earlier steps, too: name the session to which this step belongs (session, "
                f"step), or send {config.num_images_in_input} images.",
                "session",
            )
        raise RequestError(
            f"The model takes {config.num_images_in_input} camera images a moment, got {count}; send as many, the main "
            "camera first, in the order of training.",
            field,
        )

    def _observe(self, request: ActRequest) -> Any:
        """Return the images that the processor gets, with those of the session's earlier steps or with the trace."""
        if request.session is not None:
            return self.sessions.observe(request.session, request.step, request.images)
        return self._without_session.observe(request.images if len(request.images) > 1 else request.images[0])

    def _process(self, request: ActRequest, images: Any) -> dict[str, torch.Tensor]:
        try:
            with self._tokenizer_lock:
                return dict(self.policy.processor(instruction=request.instruction, images=images))
        except OpenVLAError as error:
            raise RequestError(str(error), request.field_names["instruction"]) from error

    def _require_proprio(self, request: ActRequest, unnorm_key: str) -> None:
        """Raise RequestError if the state is missing, superfluous or of a wrong length."""
        field, proprio_dim = request.field_names["proprio"], self.policy.model.config.proprio_dim
        if proprio_dim is None:
            if request.proprio is not None:
                raise RequestError("The model was trained without the robot's state; leave it out.", field)
            return
        if request.proprio is None:
            raise RequestError(f"The model needs the robot's state: {field}, {proprio_dim} numbers.", field)
        if len(request.proprio) != proprio_dim:
            raise RequestError(f"{field} must hold {proprio_dim} numbers, got {len(request.proprio)}.", field)
        try:
            self.policy.model.proprio_statistics(unnorm_key)
        except OpenVLAError as error:
            raise RequestError(str(error), "unnorm_key") from error

    def predict_batch(self, requests: Sequence[PreparedRequest]) -> list[Outcome]:
        """Return a prediction, or an exception instance, for each request; tokens equal those of batches of one."""
        return [
            _expected_outcome(outcome) for outcome in predict_batch(self.policy.model, requests, self.policy.actions)
        ]

    def info(self) -> PolicyInfo:
        """Return the content of ``/info``."""
        model, config = self.policy.model, cast(OpenVLAConfig, self.policy.model.config)
        has_tokens = config.action_head is None
        return PolicyInfo(
            model=self.name,
            action_head=config.action_head or "tokens",
            constrain_actions=self.policy.constrain_actions if has_tokens else None,
            default_unnorm_key=self.policy.unnorm_key,
            unnorm_keys={key: self._dataset_info(key) for key in sorted(model.norm_stats)},
            action_dim=model.get_action_dim(self.policy.unnorm_key),
            chunk_length=config.chunk_length,
            cameras=config.num_images_in_input,
            images_per_moment=1 if config.trace_prompting else config.images_per_moment,
            history_length=config.history_length,
            history_padding=self.policy.history_padding,
            trace_prompting=config.trace_prompting,
            draws_traces=self.policy.visual_trace is not None,
            proprio_dim=config.proprio_dim,
            bin_centers=None if model.bin_centers is None or not has_tokens else model.bin_centers.tolist(),
            image_size=list(self.policy.processor.image_processor.tvf_crop_params[0]["output_size"]),
            image_preset=self.policy.processor.image_preset,
            bits=stored_bits(config),
            quantization=quantization_name(model),
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            limits=replace(self.limits, max_batch_size=self.max_batch_size),
        )

    def _dataset_info(self, unnorm_key: str) -> DatasetInfo:
        statistics = self.policy.model.action_statistics(unnorm_key)
        low, high = (statistics.unnormalize(np.full(statistics.dimension, bound)) for bound in (-1.0, 1.0))
        labels = dimension_labels(statistics.dimension, unnorm_key)
        return DatasetInfo(
            action_dim=statistics.dimension,
            names=[name for name, _ in labels],
            units=[unit for _, unit in labels],
            low=low.tolist(),
            high=high.tolist(),
            mask=statistics.mask.tolist(),
        )


def _expected_outcome(outcome: Prediction | Exception) -> Outcome:
    """Return an outcome for the client: an error that is not its own is logged, and replaced by one with its id."""
    if isinstance(outcome, (Prediction, OpenVLAError)):
        return outcome
    failure = PredictionError()
    logger.error("the model failed, id %s", failure.id, exc_info=outcome)
    return failure


def action_details(prediction: Prediction, request: PreparedRequest, latency_s: float) -> ActionDetails:
    """Return the reply to a request with ``details``.

    Args:
        prediction: The prediction.
        request: The request.
        latency_s: Seconds from the request's arrival to its prediction.
    """
    output, actions = prediction.output, prediction.actions
    assert output.names is not None
    assert output.units is not None
    has_gripper = actions.shape[-1] == len(END_EFFECTOR_DIMENSIONS)
    return ActionDetails(
        actions=actions.tolist(),
        names=list(output.names),
        units=list(output.units),
        normalized_actions=_to_list(output.normalized_actions),
        token_ids=_to_list(output.token_ids),
        bin_probabilities=_to_list(output.bin_probabilities),
        entropy=_to_list(output.entropy),
        gripper=actions[..., -1].tolist() if has_gripper else None,
        unnorm_key=request.unnorm_key,
        latency_ms=latency_s * 1000,
        model_ms=prediction.model_ms,
        batch=prediction.batch_size,
        recomputed=prediction.recomputed,
        constrain_actions=prediction.constrain_actions if output.token_ids is not None else None,
        traced_image=None if request.traced_image is None else _encode_png(request.traced_image),
    )


def _encode_png(image: Image.Image) -> str:
    """Return an image as a PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _to_list(array: np.ndarray | None) -> Any:
    return None if array is None else array.tolist()
