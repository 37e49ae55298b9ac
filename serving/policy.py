"""A policy as a server holds it: requests prepared one by one, answered in batches, each answer as it were alone."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..actions_openvla import END_EFFECTOR_DIMENSIONS, dimension_labels
from ..decoding_openvla import ActionOutput, NoActionError
from ..inference.policy import Policy, stored_bits
from ..quantization_openvla import quantization_name
from .cli import Limits
from .requests import ActRequest, RequestError

logger = logging.getLogger("openvla.serving.cli")

# Only prompts of one length share a batch: padding takes attention another way, which at OpenVLA-7B's depth and 1/8 of
# its width moved logits by 0.14 in bfloat16 (CPU). Without it they were equal in bfloat16 and differed by 1e-6 in
# float32, where a larger product is summed in another order. A row whose chosen token leads the next by less than this
# (in nats; in 16 bits two roundings of a number up to 32) is answered again, alone.
CLOSE_CALL = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.03125}


class AnswerError(RuntimeError):
    """The model failed; the log has the reason under ``id``. (What is no action is a ``NoActionError``.)"""

    def __init__(self, message: str) -> None:
        self.id = uuid.uuid4().hex[:12]
        super().__init__(f"{message} The server's log explains it under id {self.id}.")


@dataclass
class Prepared:
    """A request as the model takes it.

    Attributes:
        inputs: What the processor gives, one row, on the CPU.
        unnorm_key: Whose statistics give robot units.
        proprio: float64 ``(proprio_dim,)``, or None.
        action_dim: Numbers of one action.
        details: Whether bin probabilities are wanted.
        constrain: Whether the model chooses among action tokens only.
    """

    inputs: dict[str, torch.Tensor]
    unnorm_key: str
    proprio: np.ndarray | None
    action_dim: int
    details: bool
    constrain: bool

    def joins(self, other: Prepared) -> bool:
        """Whether both may be answered in one batch."""
        mine, its = (row.inputs["input_ids"].shape for row in (self, other))
        return mine == its and self.action_dim == other.action_dim and self.constrain == other.constrain


@dataclass
class Answer:
    """The answer to a request: its output, how many rows ran with it, the model's milliseconds, how it was chosen."""

    output: ActionOutput
    rows: int
    model_ms: float
    constrained: bool
    again: bool = False


class ServedPolicy:
    """A policy and what is told about it.

    Args:
        policy: What acts.
        name: Of the model, for people.
        limits: Of the server.
    """

    def __init__(self, policy: Policy, name: str, limits: Limits) -> None:
        self.policy, self.name, self.limits = policy, name, limits
        self._tokenizing = threading.Lock()  # tokenizers refuse two threads at once
        config = policy.model.config
        # The numbers of a continuous head are the action: rounding would reach it, so every row is answered alone.
        self.batch = limits.batch if config.action_head is None else 1

    def prepare(self, request: ActRequest) -> Prepared:
        """Check a request against the model and make tensors of it; safe to call from several threads.

        Raises:
            RequestError: It does not fit the model.
        """
        model, config = self.policy.model, self.policy.model.config
        try:
            key = model.resolve_unnorm_key(request.unnorm_key or self.policy.unnorm_key)
            dimension = model.get_action_dim(key)
        except (KeyError, ValueError) as error:
            raise RequestError(error.args[0], "unnorm_key") from error
        if len(request.images) != config.num_images_in_input:
            raise RequestError(
                f"The model takes {config.num_images_in_input} camera images a moment, got {len(request.images)}; send "
                "as many, the main camera first, in the order of training.",
                request.names["image"],
            )
        self._require_proprio(request, key)
        constrain = self.policy.constrain_actions if request.constrain_actions is None else request.constrain_actions
        if request.constrain_actions and config.action_head is not None:
            raise RequestError(
                "The model answers in numbers, not in tokens; leave constrain_actions out.", "constrain_actions"
            )
        images = request.images if len(request.images) > 1 else request.images[0]
        try:
            with self._tokenizing:
                inputs = dict(self.policy.processor(instruction=request.instruction, images=images))
        except ValueError as error:
            raise RequestError(str(error), request.names["instruction"]) from error
        return Prepared(inputs, key, request.proprio, dimension, request.details, constrain)

    def _require_proprio(self, request: ActRequest, key: str) -> None:
        field, needed = request.names["proprio"], self.policy.model.config.proprio_dim
        if needed is None and request.proprio is not None:
            raise RequestError("The model was trained without the robot's state; leave it out.", field)
        if needed is not None and request.proprio is None:
            raise RequestError(f"The model needs the robot's state: {field}, {needed} numbers.", field)
        if needed is not None and len(request.proprio) != needed:
            raise RequestError(f"{field} must hold {needed} numbers, got {len(request.proprio)}.", field)
        if needed is not None:
            try:
                self.policy.model.proprio_statistics(key)
            except ValueError as error:
                raise RequestError(str(error), "unnorm_key") from error

    def answer(self, batch: Sequence[Prepared]) -> list[Answer | AnswerError | NoActionError]:
        """Return answers in the order of the requests, each with the tokens that it would have had alone."""
        if len(batch) > 1:
            try:
                answers = self._predicted(batch)
            except NoActionError as error:  # one row's fault must not be the others'
                logger.info("a batch of %d is answered row by row: %s", len(batch), error)
                return [self._alone(row) for row in batch]
            except Exception:
                logger.exception("a batch of %d failed; its rows are answered one by one", len(batch))
                return [self._alone(row) for row in batch]
            return [
                answer if self._is_clear(answer.output) else self._alone(row, again=True)
                for row, answer in zip(batch, answers)
            ]
        return [self._alone(row) for row in batch]

    def _alone(self, row: Prepared, again: bool = False) -> Answer | AnswerError | NoActionError:
        try:
            answer = self._predicted([row])[0]
        except NoActionError as error:
            return NoActionError(str(error))  # without the traceback, which would hold the row's tensors
        except Exception as error:
            failed = AnswerError(f"The model failed: {type(error).__name__}.")
            logger.exception("the model failed, id %s", failed.id)
            return failed
        answer.again = again
        return answer

    def _predicted(self, batch: Sequence[Prepared]) -> list[Answer]:
        started = time.perf_counter()
        wanted = len(batch) > 1 or batch[0].details
        output = self.policy.model.predict_action(
            **{name: torch.cat([row.inputs[name] for row in batch]) for name in batch[0].inputs},
            unnorm_key=[row.unnorm_key for row in batch],
            proprio=None if batch[0].proprio is None else np.stack([row.proprio for row in batch]),
            return_dict=wanted,
            constrain_actions=batch[0].constrain,
            strict=len(batch) == 1,  # of a batch, rows with other tokens are answered again, alone: ``_is_clear``
        )
        output = output if wanted else ActionOutput(actions=output)
        spent = (time.perf_counter() - started) * 1000
        rows = [output] if len(batch) == 1 else [_row(output, index) for index in range(len(batch))]
        return [Answer(row, len(batch), spent, batch[0].constrain) for row in rows]

    def _is_clear(self, output: ActionOutput) -> bool:
        """Whether every token was chosen by more than rounding could turn, and is an action token."""
        tokens = self.policy.model.action_token_ids
        if (output.token_ids < tokens.start).any() or (output.token_ids >= tokens.stop).any():
            return False
        second, first = np.moveaxis(np.sort(output.bin_probabilities, axis=-1)[..., -2:], -1, 0)
        with np.errstate(divide="ignore"):
            lead = np.log(first) - np.log(second)
        return bool((lead > CLOSE_CALL.get(self.policy.model.dtype, max(CLOSE_CALL.values()))).all())

    def info(self) -> dict[str, Any]:
        """What a client or a page needs to know, ready for JSON."""
        model, config = self.policy.model, self.policy.model.config
        return {
            "model": self.name,
            "answer": config.action_head or "tokens",
            "constrain_actions": self.policy.constrain_actions if config.action_head is None else None,
            "default_unnorm_key": self.policy.unnorm_key,
            "unnorm_keys": {key: self._dataset(key) for key in sorted(model.norm_stats)},
            "action_dim": model.get_action_dim(self.policy.unnorm_key),
            "chunk_length": config.chunk_length,
            "cameras": config.num_images_in_input,
            "proprio_dim": config.proprio_dim,
            "bin_centers": model.bin_centers.tolist() if config.action_head is None else None,
            "image_size": list(self.policy.processor.image_processor.tvf_crop_params[0]["output_size"]),
            "image_preset": self.policy.processor.image_preset,
            "bits": stored_bits(config),
            "quantization": quantization_name(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "limits": {**asdict(self.limits), "batch": self.batch},
        }

    def _dataset(self, key: str) -> dict[str, Any]:
        """Dimensions of a dataset's actions: names, units, the range in robot units that the model can answer with."""
        statistics = self.policy.model.action_statistics(key)
        low, high = (statistics.unnormalize(np.full(statistics.dimension, end)) for end in (-1.0, 1.0))
        labels = dimension_labels(statistics.dimension, key)
        return {
            "action_dim": statistics.dimension,
            "names": [name for name, _ in labels],
            "units": [unit for _, unit in labels],
            "low": low.tolist(),
            "high": high.tolist(),
            "mask": statistics.mask.tolist(),
        }

    def details(self, answer: Answer, unnorm_key: str, latency: float) -> dict[str, Any]:
        """An answer with what was behind it, ready for JSON.

        Args:
            answer: Of ``answer``.
            unnorm_key: Whose statistics gave its units.
            latency: Seconds from the request's arrival.
        """
        output = answer.output
        listed = {
            name: None if getattr(output, name) is None else getattr(output, name).tolist()
            for name in ("actions", "normalized_actions", "token_ids", "bin_probabilities", "entropy")
        }
        has_gripper = output.actions.shape[-1] == len(END_EFFECTOR_DIMENSIONS)
        return {
            **listed,
            "names": list(output.names),
            "units": list(output.units),
            "gripper": output.actions[..., -1].tolist() if has_gripper else None,
            "unnorm_key": unnorm_key,
            "latency_ms": latency * 1000,
            "model_ms": answer.model_ms,
            "batch": answer.rows,
            "answered_again": answer.again,
            "constrain_actions": answer.constrained if output.token_ids is not None else None,
        }


def _row(output: ActionOutput, index: int) -> ActionOutput:
    """One row of a batch; names are of all rows the same."""
    rows = {name: value if name == "names" else value[index] for name, value in output.items()}
    return ActionOutput(**rows)
