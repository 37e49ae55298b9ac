"""Sessions: the episodes of the clients whose model needs images of earlier steps, or traces that are drawn of them."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..inference.policy import Policy
from .requests import RequestError

SESSION_STATUS = 409  # of a frame that does not continue its session
MAX_BYTES = 2**30  # of the images that all sessions keep; sessions of small frames need some megabytes


@dataclasses.dataclass
class Session:
    """One client's episode.

    Attributes:
        policy: The served policy with a history and a trace of this session's own.
        step: Number of the newest frame; -1 before the first.
        received: Its images as the client sent them.
        observed: What the processor gets for it.
    """

    policy: Policy
    step: int = -1
    received: Sequence[Image.Image] = ()
    observed: Any = None

    @property
    def num_bytes(self) -> int:
        """Return the size of the images that are kept, at most: those of every step as large as the newest ones."""
        pixels = sum(image.width * image.height for image in self.received)
        return 3 * pixels * self.policy.model.config.history_length


class Sessions:
    """The sessions of a server; the one that was used longest ago is forgotten where there are too many.

    Args:
        policy: The served policy.
        max_sessions: Maximum number of sessions.
    """

    def __init__(self, policy: Policy, max_sessions: int) -> None:
        self.policy, self.max_sessions = policy, max_sessions
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()  # also for the tracker, which need not be safe in several threads

    def __len__(self) -> int:
        return len(self._sessions)

    def observe(self, name: str, step: int, images: Sequence[Image.Image]) -> Any:
        """Add a frame to a session, and return what the processor gets: with earlier images, or with the trace.

        A frame that is sent again, with its step and its images, changes nothing: a client may retry.

        Args:
            name: The session's name.
            step: Number of the frame in its episode; 0 begins an episode.
            images: Images of this step.

        Raises:
            RequestError: The session is unknown, or has a newer frame.
        """
        with self._lock:
            session = self._sessions.get(name)
            if session is None:
                session = Session(self._new_policy())
            if step == session.step and images == session.received:
                return session.observed
            if step == 0:
                session.policy.reset()
            elif name not in self._sessions:
                raise RequestError(
                    f"No session {name!r:.60} is known: the server was restarted, {self.max_sessions} other ones were "
                    "used since, or its last frame could not be used. Begin an episode: step 0.",
                    "session",
                    SESSION_STATUS,
                )
            elif step <= session.step:
                raise RequestError(
                    f"step must be above {session.step}, that of the session's newest frame, or 0 where an episode "
                    f"begins; got {step} with other images.",
                    "step",
                    SESSION_STATUS,
                )
            image = images[0] if len(images) == 1 else list(images)
            self._sessions.pop(name, None)  # a session whose frame cannot be used ends, as if it were forgotten
            session.observed = session.policy.history.append(session.policy.observe(image))
            session.step, session.received = step, list(images)
            self._sessions[name] = session
            while len(self._sessions) > self.max_sessions or (
                len(self._sessions) > 1 and self._num_bytes() > MAX_BYTES
            ):
                self._sessions.popitem(last=False)
            return session.observed

    def _num_bytes(self) -> int:
        return sum(session.num_bytes for session in self._sessions.values())

    def _new_policy(self) -> Policy:
        trace = self.policy.visual_trace
        return dataclasses.replace(self.policy, visual_trace=None if trace is None else trace.new())
