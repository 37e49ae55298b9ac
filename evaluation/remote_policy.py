"""A policy behind a server of openpi's WebSocket protocol: pi0, pi0.5, GR00T and others through their own servers.

The server sends its metadata first. Every request is a map with images, state and instruction, every reply one with
``actions``, an action chunk; a text message is an error. The client here replaces openpi's own, which waits for ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from ..actions_openvla import as_numbers
from ..decoding_openvla import NoActionError
from ..errors_openvla import OpenVLAError, OpenVLAValueError
from ..inference.openpi_messages import pack_msgpack, unpack_msgpack
from .checks import GRIPPERS, LIBERO_ACTION_DIM, LIBERO_PRESET, LIBERO_PROPRIO_DIM

OPEN_SECONDS = 30.0  # for the connection and the metadata
RENDERED_SIZE = 256  # of the harness's frames
MIN_IMAGE_SIZE = 16
NO_ACTION = "no_action: "  # how openvla serve begins the text of a NoActionError


class ServerConnectionError(OpenVLAError, ConnectionError):
    """A policy server that cannot be reached, died, or did not answer in time."""


@dataclass(frozen=True)
class ServerConvention:
    """Observations and actions of a server; the defaults are those of openpi's LIBERO policies.

    Attributes:
        image: Key of the third-person camera's frame, uint8 ``(size, size, 3)``, rotated by 180 degrees as in training.
        wrist_image: Key of the wrist camera's frame; None sends none.
        state: Key of the state, float64 ``(8,)``: position (m), axis-angle (rad), fingers (m); None sends none.
        prompt: Key of the instruction.
        actions: Key of the reply's action chunk, ``(chunk, 7)``.
        image_size: Height and width to which frames are resized (bilinear, as openpi's client does); None sends them as
            they are rendered, 256 pixels wide.
        gripper: Convention of the actions' gripper: "libero" (-1 open, +1 closed) or "openvla" (0 closed, 1 open).
        n_action_steps: Actions of a chunk to execute before the next chunk is requested; None is all.
    """

    image: str = "observation/image"
    wrist_image: str | None = "observation/wrist_image"
    state: str | None = "observation/state"
    prompt: str = "prompt"
    actions: str = "actions"
    image_size: int | None = 224
    gripper: str = "libero"
    n_action_steps: int | None = 5

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ValueError: A field is out of range, or two keys of the request are equal.
        """
        if self.n_action_steps is not None and self.n_action_steps < 1:
            raise OpenVLAValueError(f"--n-action-steps must be 1 or more, got {self.n_action_steps}.")
        if self.gripper not in GRIPPERS:
            raise OpenVLAValueError(f"The server's gripper must be one of {list(GRIPPERS)}, got {self.gripper!r}.")
        if self.image_size is not None and not MIN_IMAGE_SIZE <= self.image_size <= RENDERED_SIZE:
            raise OpenVLAValueError(
                f"The image size must be {MIN_IMAGE_SIZE} to {RENDERED_SIZE} pixels, that of the rendered frames, got "
                f"{self.image_size}."
            )
        keys = [key for key in (self.image, self.wrist_image, self.state, self.prompt) if key is not None]
        if len(set(keys)) < len(keys) or not all(keys):
            raise OpenVLAValueError(f"The keys of image, wrist image, state and prompt must differ, got {keys}.")


def is_openvla_server(metadata: Any) -> bool:
    """Return whether the metadata are those of ``openvla serve``."""
    return isinstance(metadata, dict) and {"default_unnorm_key", "chunk_length", "cameras"} <= metadata.keys()


def convention_of(metadata: Any) -> ServerConvention:
    """Return the convention of a server by its metadata: that of ``openvla serve``, or of openpi's LIBERO policies.

    Raises:
        ValueError: The policy of ``openvla serve`` is one of another robot, or rotates the frames itself.
    """
    if not is_openvla_server(metadata):
        return ServerConvention()
    cameras, proprio_dim, action_dim = metadata["cameras"], metadata.get("proprio_dim"), metadata.get("action_dim")
    preset = str(metadata.get("image_preset"))
    if cameras not in (1, 2) or proprio_dim not in (None, LIBERO_PROPRIO_DIM) or action_dim != LIBERO_ACTION_DIM:
        raise OpenVLAValueError(
            f"LIBERO has 2 cameras, a state of {LIBERO_PROPRIO_DIM} numbers and actions of {LIBERO_ACTION_DIM}, but "
            f"the served policy takes {cameras} images and {proprio_dim or 'no'} numbers of proprio, and answers "
            f"{action_dim}: serve a policy of LIBERO's robot."
        )
    if preset.endswith("-raw"):
        raise OpenVLAValueError(
            f"The server's image_preset {preset!r} rotates the simulator's frames, but this evaluation sends rotated "
            f"ones: serve the model with the image_preset {preset.removesuffix('-raw')!r} in its processor."
        )
    return ServerConvention(
        wrist_image=ServerConvention.wrist_image if cameras > 1 else None,
        state=ServerConvention.state if proprio_dim is not None else None,
        image_size=None,
        gripper="openvla",
        n_action_steps=None,
    )


class RemotePolicy:
    """A policy on a server of openpi's protocol, with the interface of ``Policy``: one connection, one robot.

    Args:
        url: ``ws://host:port`` or ``wss://...``.
        token: Sent as openpi's ``Authorization: Api-Key``.
        timeout: Seconds to wait for an action.
        **fields: Fields of ``ServerConvention`` that differ from what the metadata say.

    Attributes:
        metadata: What the server says of itself.
        convention: What it takes and answers.

    Raises:
        ConnectionError: The server cannot be reached.
        ValueError: The URL, the metadata or a field is not valid.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 60.0, **fields: Any) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise OpenVLAValueError(f"The server must be ws://host:port, got {url!r}.")
        if not timeout > 0:
            raise OpenVLAValueError(f"The timeout must be above 0 seconds, got {timeout}.")
        self.url, self.timeout = url, timeout
        self._headers = {"Authorization": f"Api-Key {token}"} if token else None
        self._lock = threading.Lock()
        self._chunk_length: int | None = None
        message = self._connect()
        self.metadata = unpack_msgpack(message)
        self.metadata_digest = hashlib.sha256(message).hexdigest()[:16]
        self.convention = dataclasses.replace(convention_of(self.metadata), **fields)

    def clone(self) -> RemotePolicy:
        """Return the same policy on a connection of its own, for another robot."""
        other = RemotePolicy.__new__(RemotePolicy)
        other.__dict__.update(self.__dict__)
        other._lock = threading.Lock()
        message = other._connect()
        if hashlib.sha256(message).hexdigest()[:16] != self.metadata_digest:
            raise OpenVLAValueError(f"{self.url} sends other metadata than before: was another model started there?")
        return other

    def close(self) -> None:
        """Close the connection."""
        self._open.close()

    def describe(self) -> dict[str, Any]:
        """Return the fields of ``EvaluationSettings`` that the policy has, and "warnings"; request one action.

        Raises:
            ConnectionError: The server gives no reply.
            ValueError: The reply is no chunk of LIBERO's actions, or shorter than ``n_action_steps``.
        """
        self._check()
        metadata = self.metadata if is_openvla_server(self.metadata) else {}
        warnings = []
        if metadata and metadata.get("image_preset") is None:
            warnings.append(
                "The server does not prepare frames (its image_preset is None), but openvla evaluate --model would, by "
                f"{LIBERO_PRESET!r}, as OpenVLA's own evaluation does."
            )
        convention = dataclasses.asdict(self.convention)
        return {
            "model": self.url,
            "weights_digest": None,
            "unnorm_key": metadata.get("default_unnorm_key"),
            "image_preset": metadata.get("image_preset"),
            "constrain_actions": metadata.get("constrain_actions"),
            "actions": None,
            "history_padding": metadata.get("history_padding"),
            "n_action_steps": convention.pop("n_action_steps"),
            "server": {"metadata_digest": self.metadata_digest, **convention},
            "warnings": warnings,
        }

    def _check(self) -> None:
        """Request an action for a grey frame, which validates the reply; raise as ``describe``."""
        frame = np.full((RENDERED_SIZE, RENDERED_SIZE, 3), 128, np.uint8)
        try:
            self.act([frame, frame], "pick up the milk", np.zeros(LIBERO_PROPRIO_DIM))
        except NoActionError:  # which a grey frame may well give
            return
        steps, length = self.convention.n_action_steps, self._chunk_length
        if steps is not None and length is not None and steps > length:
            raise OpenVLAValueError(
                f"--n-action-steps is {steps}, but {self.url} answers chunks of {length} actions; give 1 to {length}."
            )

    def act(self, image: Any, instruction: str, proprio: Any = None) -> np.ndarray:
        """Return the chunk for an observation, in the server's units.

        Args:
            image: Frames of the third-person and the wrist camera, uint8 ``(height, width, 3)`` each.
            instruction: Instruction for the robot.
            proprio: State ``(8,)``.

        Returns:
            float64 ``(chunk, 7)``.

        Raises:
            NoActionError: A model of ``openvla serve`` predicted no action.
            ConnectionError: The server died, or did not answer in time.
            ValueError: The server rejects the observation, or its reply is no chunk of LIBERO's actions.
        """
        convention = self.convention
        request: dict[str, Any] = {convention.image: self._resized(image[0]), convention.prompt: instruction}
        if convention.wrist_image is not None:
            request[convention.wrist_image] = self._resized(image[1])
        if convention.state is not None:
            request[convention.state] = np.asarray(proprio, np.float64)
        with self._lock:
            reply = self._exchange(pack_msgpack(request), sorted(request))
        return self._chunk_of(reply)

    def _connect(self) -> bytes:
        """Open a connection; return the message of the metadata."""
        self._open = contextlib.ExitStack()
        try:
            connection = connect(
                self.url,
                compression=None,
                max_size=None,
                open_timeout=OPEN_SECONDS,
                ping_interval=None,  # a server that computes does not answer pings
                additional_headers=self._headers,
            )
            self._connection = self._open.enter_context(connection)
            message = self._connection.recv(timeout=OPEN_SECONDS)
        except (OSError, WebSocketException) as error:  # TimeoutError is an OSError
            self.close()
            raise ServerConnectionError(
                f"No server of openpi's protocol at {self.url} ({type(error).__name__}: {error}); start it first, and "
                "give its token if it needs one."
            ) from error
        if isinstance(message, str):
            self.close()
            raise ServerConnectionError(f"{self.url} sent an error in place of its metadata: {message.strip()[-500:]}")
        return message

    def _exchange(self, request: bytes, keys: Sequence[str]) -> Any:
        try:
            self._connection.send(request)
            message = self._connection.recv(timeout=self.timeout)
        except (OSError, WebSocketException) as error:
            self.close()  # else the late reply would be taken for the next one's
            raise ServerConnectionError(
                f"{self.url} gave no action within {self.timeout:g} s, or died ({type(error).__name__}: {error})."
            ) from error
        if not isinstance(message, str):
            return unpack_msgpack(message)
        if message.startswith(NO_ACTION):
            raise NoActionError(message.removeprefix(NO_ACTION))
        raise OpenVLAValueError(
            f"{self.url} rejects the observation, which has the keys {list(keys)}: {message.strip()[-500:]}"
        )

    def _chunk_of(self, reply: Any) -> np.ndarray:
        """Return the validated chunk of a reply."""
        key, subject = self.convention.actions, f"The reply of {self.url}"
        if not isinstance(reply, dict) or key not in reply:
            found = sorted(map(str, reply)) if isinstance(reply, dict) else type(reply).__name__
            raise OpenVLAValueError(f"{subject} has no {key!r}, it has {found}; name the key of its actions.")
        chunk = as_numbers(reply[key], f"{subject}, {key!r},")
        if chunk.ndim != 2 or chunk.shape[1] != LIBERO_ACTION_DIM or not len(chunk):
            raise OpenVLAValueError(
                f"{subject} has actions of shape {chunk.shape}, but LIBERO takes chunks of shape (chunk, "
                f"{LIBERO_ACTION_DIM}): is it a policy of LIBERO's robot?"
            )
        if not np.isfinite(chunk).all():
            raise OpenVLAValueError(f"{subject} has actions that are not finite: {chunk.tolist()}")
        expected = self.metadata["chunk_length"] if is_openvla_server(self.metadata) else self._chunk_length
        if expected is not None and len(chunk) != expected:
            raise OpenVLAValueError(f"{subject} is a chunk of {len(chunk)} actions, but {expected} were expected.")
        self._chunk_length = len(chunk)
        return chunk

    def _resized(self, frame: Any) -> np.ndarray:
        frame, size = np.asarray(frame), self.convention.image_size
        if size is None or frame.shape[:2] == (size, size):
            return frame
        return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BILINEAR))
