"""Execute action chunks one action per control step: open loop, or averaged where chunks overlap."""

from __future__ import annotations

import math
import threading
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..actions_openvla import as_numbers
from ..errors_openvla import OpenVLAValueError


class ActingPolicy(Protocol):
    """Anything that predicts actions: a ``Policy``, an ``ActionQueue``, a ``PolicyClient``."""

    def act(self, image: Any, instruction: str, proprio: Any = None) -> np.ndarray:
        """Return an action ``(action_dim,)`` or a chunk ``(chunk, action_dim)``."""
        ...


class History(Protocol):
    """Images of the last moments: ``ImageHistory``, or that of a ``PolicyClient``."""

    def clear(self) -> None:
        """Begin an episode."""

    def append(self, image: Any) -> Any:
        """Add the images of this moment; return all images that the model takes."""


@runtime_checkable
class KeepsHistory(Protocol):
    """A policy whose model may take images of several moments: ``Policy``, ``PolicyClient``."""

    def new_history(self) -> History:
        """Return an empty history of images."""
        ...


@dataclass(frozen=True)
class RequestId:
    """The control step at which a chunk was requested; the chunk's first action is for this step.

    Attributes:
        episode: Number of calls of ``reset`` before the request.
        step: Number of actions returned since the last ``reset``.
    """

    episode: int
    step: int


class ActionQueue:
    """Queue that returns one action per control step from a policy that predicts action chunks.

    The first action of a chunk is for the step at which the chunk was requested. When a chunk arrives late, the actions
    of past steps are skipped. A chunk is dropped if all its steps are past, if it was requested before the newest one,
    or if it belongs to an earlier episode. Thread-safe: one thread may request and push chunks while another takes
    actions.

    For a model that takes images of several moments the queue keeps its own history, from the images of every ``act``
    and ``request_async``; call one of them in every control step.

    A loop that waits for the policy needs only ``act``:

        queue = ActionQueue(policy, n_action_steps=8)
        action = queue.act(images, instruction, proprio)           # every control step

    A loop that does not wait requests the next chunk in a thread and takes actions meanwhile:

        queue.push(queue.request(), policy.act(images, instruction, proprio))    # wait for the first chunk
        with ThreadPoolExecutor(1) as executor:
            while running:                                         # every control step
                queue.request_async(executor, images, instruction, proprio)
                action = queue.next()

    Args:
        policy: Predicts the chunks: ``policy.act(image, instruction, proprio)`` returns ``(chunk, action_dim)``. May be
            None if all chunks are pushed by the caller.
        n_action_steps: Actions of a chunk to execute before the next chunk is requested; None executes all of them.
        temporal_ensemble_coeff: None executes the newest chunk. A number m >= 0 averages the actions that all chunks
            predict for the current step with weights exp(-m * i), where i counts from the oldest chunk (temporal
            ensembling, Zhao et al. 2023, with m = 0.01); ``n_action_steps`` should then be small. Averaging suits
            continuous dimensions, not a binary gripper.

    Raises:
        ValueError: ``n_action_steps`` or ``temporal_ensemble_coeff`` is out of range.
    """

    def __init__(
        self,
        policy: ActingPolicy | None = None,
        *,
        n_action_steps: int | None = None,
        temporal_ensemble_coeff: float | None = None,
    ) -> None:
        if n_action_steps is not None and (
            isinstance(n_action_steps, bool) or not isinstance(n_action_steps, int) or n_action_steps < 1
        ):
            raise OpenVLAValueError(f"n_action_steps must be an integer, 1 or more, or None, got {n_action_steps!r}.")
        if temporal_ensemble_coeff is not None and not (
            temporal_ensemble_coeff >= 0 and math.isfinite(temporal_ensemble_coeff)
        ):
            raise OpenVLAValueError(
                f"temporal_ensemble_coeff must be 0 or more, or None, got {temporal_ensemble_coeff!r}."
            )
        self.policy = policy
        self.n_action_steps = n_action_steps
        self.temporal_ensemble_coeff = temporal_ensemble_coeff
        self._lock = threading.Lock()
        self._episode = self._step = 0
        self._pending: RequestId | None = None
        self._chunks: dict[int, np.ndarray] = {}  # key: the step at which the chunk was requested
        self._history: History | None = policy.new_history() if isinstance(policy, KeepsHistory) else None
        self._async_error: Exception | None = None  # raised by the policy in the last asynchronous request

    def reset(self) -> None:
        """Begin an episode and drop all chunks of the previous one."""
        with self._lock:
            self._episode += 1
            self._step, self._pending, self._async_error = 0, None, None
            self._chunks.clear()
        if self._history is not None:
            self._history.clear()

    @property
    def needs_chunk(self) -> bool:
        """Return True if none is pending and the queue is empty or ``n_action_steps`` were executed."""
        with self._lock:
            if self._pending is not None:
                return False
            newest = max(self._chunks, default=None)
            executed_enough = (
                self.n_action_steps is not None and newest is not None and self._step - newest >= self.n_action_steps
            )
            return executed_enough or not self._current_actions()

    def request(self) -> RequestId:
        """Register that a chunk is requested for an observation of the current step."""
        with self._lock:
            self._pending = RequestId(self._episode, self._step)
            return self._pending

    def push(self, request_id: RequestId, chunk: np.ndarray) -> bool:
        """Add the chunk of a request.

        Args:
            request_id: Return value of ``request``.
            chunk: float ``(chunk, action_dim)``.

        Returns:
            True if the chunk was added; False if all its steps are past, if it was requested before the newest chunk,
            or if it belongs to an earlier episode.

        Raises:
            ValueError: The chunk has another shape, is not finite, is shorter than ``n_action_steps``, or has another
                ``action_dim`` than earlier chunks.
        """
        chunk = as_numbers(chunk, "A chunk")
        if chunk.ndim != 2 or 0 in chunk.shape:
            raise OpenVLAValueError(f"A chunk must have shape (chunk, action_dim), got {chunk.shape}.")
        if not np.isfinite(chunk).all():
            raise OpenVLAValueError("A chunk must be finite, got NaN or infinity.")
        if self.n_action_steps is not None and self.n_action_steps > len(chunk):
            raise OpenVLAValueError(
                f"n_action_steps={self.n_action_steps} actions are to be executed, but the chunk has {len(chunk)}."
            )
        with self._lock:
            if self._pending == request_id:
                self._pending = None
            newest = max(self._chunks, default=None)
            if newest is not None and self._chunks[newest].shape[1] != chunk.shape[1]:
                raise OpenVLAValueError(
                    f"The chunk has {chunk.shape[1]} dimensions, earlier ones have {self._chunks[newest].shape[1]}."
                )
            is_past = request_id.step + len(chunk) <= self._step
            is_outdated = self.temporal_ensemble_coeff is None and newest is not None and request_id.step < newest
            if request_id.episode != self._episode or is_past or is_outdated:
                return False
            self._chunks[request_id.step] = chunk
            return True

    def next(self) -> np.ndarray:
        """Return the action of the current step, float64 ``(action_dim,)``, and advance by one step.

        Raises:
            ValueError: No chunk has an action for the current step; the robot should stop, not repeat an action.
        """
        with self._lock:
            actions = self._current_actions()
            if not actions:
                raise OpenVLAValueError(self._empty_message()) from self._async_error
            if self.temporal_ensemble_coeff is None:
                action = actions[-1]
            else:
                weights = np.exp(-self.temporal_ensemble_coeff * np.arange(len(actions)))
                action = np.average(np.stack(actions), axis=0, weights=weights)
            self._step += 1
            self._chunks = {step: chunk for step, chunk in self._chunks.items() if step + len(chunk) >= self._step}
            return action.copy()

    def act(self, image: Any, instruction: str, proprio: Any = None) -> np.ndarray:
        """Return the action of the current step; call the policy first if a chunk is needed.

        Args:
            image: Camera image or list of camera images, as ``policy.act`` takes it.
            instruction: Instruction for the robot.
            proprio: Robot state, for policies that take one.

        Returns:
            float64 ``(action_dim,)`` in robot units.

        Raises:
            ValueError: The queue has no policy, or ``push`` rejects the chunk. Errors of the policy pass through.
        """
        image = self._with_history(image)
        if self.needs_chunk:
            request_id = self.request()
            try:
                self.push(request_id, self._predict(image, instruction, proprio))
            finally:
                self._pending = None  # after a failure the next step requests again
        return self.next()

    def request_async(self, executor: Executor, image: Any, instruction: str, proprio: Any = None) -> Future | None:
        """Call the policy in a thread if a chunk is needed, without waiting.

        If the policy fails, the next call requests again; when no action is left, ``next`` raises from that failure.

        Args:
            executor: Runs the policy, for example ``ThreadPoolExecutor(1)``.
            image: See ``act``.
            instruction: See ``act``.
            proprio: See ``act``.

        Returns:
            A future with the return value of ``push``, or the policy's exception; None if no chunk is needed.
        """
        image = self._with_history(image)
        if not self.needs_chunk:
            return None
        request_id = self.request()

        def predict_and_push() -> bool:
            try:
                added = self.push(request_id, self._predict(image, instruction, proprio))
                self._async_error = None
            except Exception as error:
                self._async_error = error
                raise
            finally:
                with self._lock:
                    if self._pending == request_id:
                        self._pending = None
            return added

        return executor.submit(predict_and_push)

    def _with_history(self, image: Any) -> Any:
        """Return the images that the policy takes: with those of earlier steps, where its model takes several."""
        return image if self._history is None else self._history.append(image)

    def _predict(self, image: Any, instruction: str, proprio: Any) -> np.ndarray:
        if self.policy is None:
            raise OpenVLAValueError("This ActionQueue has no policy; pass one, or request and push chunks yourself.")
        return self.policy.act(image, instruction, proprio)

    def _current_actions(self) -> list[np.ndarray]:
        """Return the actions that the chunks predict for the current step, oldest chunk first."""
        chunks = sorted(self._chunks.items())
        return [chunk[self._step - start] for start, chunk in chunks if 0 <= self._step - start < len(chunk)]

    def _empty_message(self) -> str:
        newest = max(self._chunks, default=None)
        if newest is None:
            reason = "no chunk was pushed yet"
        else:
            reason = f"the last chunk was for steps {newest} to {newest + len(self._chunks[newest]) - 1}"
        return f"There is no action for step {self._step}: {reason}. Request a chunk and push it first."
