"""Playing chunks of actions one by one: open loop for some steps, or blended where chunks overlap."""

from __future__ import annotations

import math
import threading
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..actions_openvla import as_numbers
from ..errors_openvla import OpenVLAValueError


@dataclass(frozen=True)
class Ticket:
    """When a chunk was asked for: what its first action is meant for.

    Attributes:
        episode: Counts ``reset``.
        step: Counts actions since the last ``reset``.
    """

    episode: int
    step: int


class ActionChunk:
    """One action a step out of a policy that answers with chunks; the model knows nothing of it.

    An answer is meant for the moment that it was asked at. Where it comes late, the actions whose moment has passed are
    skipped, and an answer that is past altogether, older than the one that is played, or of an earlier episode, is not
    played at all. Safe to use from several threads: one asks and answers while another plays.

    A loop that waits for the policy needs ``act`` alone:

        player = ActionChunk(policy, steps=8)
        action = player.act(images, instruction, proprio)          # every control step

    One that does not wait asks in a thread when it is ``due`` and goes on playing meanwhile:

        player.answer(player.ask(), policy.act(images, instruction, proprio))    # the first is waited for
        with ThreadPoolExecutor(1) as thread:
            while running:                                         # every control step
                player.ask_in(thread, images, instruction, proprio)
                action = player.next()

    Args:
        policy: What answers: ``policy.act(image, instruction, proprio)`` gives ``(chunk, action_dim)``.
        steps: Actions played of an answer before the next is asked for; None plays all of it.
        blend: None plays the newest answer. A number m, 0 or more, averages all answers that speak of this moment with
            weights exp(-m * i), i counting from the oldest (temporal ensembling, Zhao et al. 2023, who take 0.01);
            ``steps`` should then be small. Averaging suits continuous dimensions, not an open-or-close gripper.

    Raises:
        ValueError: ``steps`` or ``blend`` is out of range.
    """

    def __init__(self, policy: Any = None, *, steps: int | None = None, blend: float | None = None) -> None:
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise OpenVLAValueError(f"steps must be a whole number, 1 or more, or None, got {steps!r}.")
        if blend is not None and not (blend >= 0 and math.isfinite(blend)):
            raise OpenVLAValueError(f"blend must be 0 or more, or None, got {blend!r}.")
        self.policy, self.steps, self.blend = policy, steps, blend
        self._lock = threading.Lock()
        self._episode = self._step = 0
        self._waiting: Ticket | None = None
        self._answers: dict[int, np.ndarray] = {}  # by the step that they were asked at
        self._failure: Exception | None = None  # of the last time that the policy was asked in a thread

    def reset(self) -> None:
        """Begin an episode: answers of the one before are not played."""
        with self._lock:
            self._episode += 1
            self._step, self._waiting, self._failure = 0, None, None
            self._answers.clear()

    @property
    def due(self) -> bool:
        """Whether it is time to ask: no answer is awaited, and nothing is left to play or ``steps`` have passed."""
        with self._lock:
            if self._waiting is not None:
                return False
            newest = max(self._answers, default=None)
            played_enough = self.steps is not None and newest is not None and self._step - newest >= self.steps
            return played_enough or not self._current()

    def ask(self) -> Ticket:
        """Say that the policy is asked now, of an image taken now."""
        with self._lock:
            self._waiting = Ticket(self._episode, self._step)
            return self._waiting

    def answer(self, ticket: Ticket, chunk: np.ndarray) -> bool:
        """Take the answer to a ticket.

        Args:
            ticket: What ``ask`` gave.
            chunk: float ``(chunk, action_dim)``.

        Returns:
            Whether any of it will be played: False for one that is past, outdated or of an earlier episode.

        Raises:
            ValueError: It is no chunk, not finite, shorter than ``steps``, or of another number of dimensions.
        """
        chunk = as_numbers(chunk, "A chunk")
        if chunk.ndim != 2 or 0 in chunk.shape:
            raise OpenVLAValueError(f"A chunk must have shape (chunk, action_dim), got {chunk.shape}.")
        if not np.isfinite(chunk).all():
            raise OpenVLAValueError("A chunk must be finite, got NaN or infinity.")
        if self.steps is not None and self.steps > len(chunk):
            raise OpenVLAValueError(f"steps={self.steps} actions are to be played, but the chunk holds {len(chunk)}.")
        with self._lock:
            if self._waiting == ticket:
                self._waiting = None
            newest = max(self._answers, default=None)
            if newest is not None and self._answers[newest].shape[1] != chunk.shape[1]:
                raise OpenVLAValueError(
                    f"The chunk has {chunk.shape[1]} dimensions, earlier ones {self._answers[newest].shape[1]}."
                )
            past = ticket.step + len(chunk) <= self._step
            outdated = self.blend is None and newest is not None and ticket.step < newest
            if ticket.episode != self._episode or past or outdated:
                return False
            self._answers[ticket.step] = chunk
            return True

    def next(self) -> np.ndarray:
        """The action of this step, float64 ``(action_dim,)``; the step then counts as done.

        Raises:
            ValueError: Every answer is past its end (or there is none): a robot should stop, not repeat.
        """
        with self._lock:
            current = self._current()
            if not current:
                last = max(self._answers, default=None)
                why = (
                    "no chunk was answered yet"
                    if last is None
                    else f"the last chunk was for steps {last} to {last + len(self._answers[last]) - 1}"
                )
                raise OpenVLAValueError(
                    f"There is no action for step {self._step}: {why}. Ask the policy and answer first."
                ) from self._failure
            if self.blend is None:
                action = current[-1]
            else:
                weights = np.exp(-self.blend * np.arange(len(current)))
                action = np.average(np.stack(current), axis=0, weights=weights)
            self._step += 1
            over = [step for step, chunk in self._answers.items() if step + len(chunk) < self._step]
            for step in over:
                del self._answers[step]
            return action.copy()

    def act(self, image: Any, instruction: str, proprio: Any = None) -> np.ndarray:
        """The action of this step, asking the policy when it is due.

        Args:
            image: What ``policy.act`` takes: one image, or the list of all cameras'.
            instruction: What the robot should do.
            proprio: The robot's state, for policies that take it.

        Returns:
            float64 ``(action_dim,)`` in robot units.

        Raises:
            ValueError: As ``answer``, or the policy's own.
        """
        if self.due:
            ticket = self.ask()
            try:
                self.answer(ticket, self.policy.act(image, instruction, proprio))
            finally:
                self._waiting = None  # also where the policy failed: the next step asks again
        return self.next()

    def ask_in(self, executor: Executor, image: Any, instruction: str, proprio: Any = None) -> Future | None:
        """Ask the policy in a thread if it is due, without waiting; ``next`` plays what there is.

        Where the policy fails it is asked again at the next call; once nothing is left to play, ``next`` raises from
        its failure.

        Args:
            executor: Whose thread asks, such as ``ThreadPoolExecutor(1)``.
            image: As of ``act``.
            instruction: As of ``act``.
            proprio: As of ``act``.

        Returns:
            What ``answer`` will say, or the policy's failure; None where it is not due.
        """
        if not self.due:
            return None
        ticket = self.ask()

        def asked() -> bool:
            try:
                played = self.answer(ticket, self.policy.act(image, instruction, proprio))
                self._failure = None
            except Exception as error:
                self._failure = error
                raise
            finally:
                with self._lock:
                    if self._waiting == ticket:
                        self._waiting = None
            return played

        return executor.submit(asked)

    def _current(self) -> list[np.ndarray]:
        """This step's action of every answer that holds one, the oldest answer first."""
        found = sorted(self._answers.items())
        return [chunk[self._step - asked] for asked, chunk in found if 0 <= self._step - asked < len(chunk)]
