"""``PolicyClient``: use a policy that runs behind ``openvla serve``.

This file imports only numpy, Pillow and the standard library, and nothing else of this package: it can be copied to a
robot's computer that has no torch. Each thread keeps one connection, and opens a new one when the server was restarted.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import os
import random
import re
import socket
import threading
import time
import uuid
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageMode

EXIF_ORIENTATION = 0x0112
# Transposes by EXIF orientation. images_openvla.py has the same table; this file must not import it.
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.05, 2.0  # doubled at every retry, with jitter
MAX_REPLY_BYTES = 64 * 2**20
MAX_MOMENTS = 16  # no model takes images of more


class PolicyServerError(RuntimeError):
    """The server returned no action.

    Attributes:
        status: HTTP status; None if there was no reply.
        field: The request's field that is invalid, if one is.
        id: Identifies the error in the server's log.
        code: "no_action" if the model's output is no action, else None.
    """

    code: str | None = None

    def __init__(
        self, message: str, status: int | None = None, field: str | None = None, id: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.id = status, field, id


class RequestRejectedError(PolicyServerError, ValueError):
    """The request is invalid (4xx); the server would reject it again."""


class NoActionPredictedError(RequestRejectedError):
    """The model's output is no action: it ended early, or contains other tokens. Stop the robot."""

    code = "no_action"


class ServerUnavailableError(PolicyServerError, ConnectionError):
    """No reply in time: no connection, or the server is overloaded or draining; retries included.

    Attributes:
        retry_after: Seconds that the server asks to wait.
    """

    retry_after = 0.0


class PolicyClient:
    """Policy on a remote server, with the interface of ``Policy``.

    A control loop with a fixed rate does not wait for the network: it plays the last chunk and requests the next one
    meanwhile; a reply that comes late loses the actions whose time steps have passed::

        client = PolicyClient("http://gpu:8000", token=token, timeout=0.5)
        queue = ActionQueue(client, n_action_steps=4)
        queue.push(queue.request(), client.act(camera(), instruction))        # the first is waited for
        with ThreadPoolExecutor(1) as thread:
            while running:
                queue.request_async(thread, camera(), instruction)            # does nothing unless a chunk is needed
                robot.step(queue.next())                                      # raises once every chunk is past
                wait_for_the_next_control_step()

    Args:
        url: ``http://host:port`` or ``https://...`` of the server.
        token: The server's bearer token.
        timeout: Seconds until a result, all retries together; the server drops a request that it cannot complete by
            then.
        retries: How often a request is sent again after a connection error or a 503. This is safe: the server keeps no
            state between requests, or (for traces) numbers the frames.
        unnorm_key: Dataset whose statistics un-normalise the action; None for the server's default.
        constrain_actions: Choose among action tokens only; None for the server's default.
        latest_only: Let the server drop this client's frames for newer ones; a dropped one is a
            ``RequestRejectedError`` with status 409.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 10.0,
        retries: int = 3,
        unnorm_key: str | None = None,
        constrain_actions: bool | None = None,
        latest_only: bool = False,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError(f"url must be http://host:port, got {url!r}.")
        if not (timeout > 0 and math.isfinite(timeout)):
            raise ValueError(f"timeout must be a number of seconds above 0, got {timeout!r}.")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries must be a whole number, 0 or more, got {retries!r}.")
        self.url, self.timeout, self.retries, self.unnorm_key = url.rstrip("/"), timeout, retries, unnorm_key
        self._is_https, self._hostname, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._base_path = parts.path.rstrip("/")
        self._thread_local = threading.local()
        self._model: dict[str, Any] | None = None  # the server's /info, asked for once
        self._history = _History(self)
        self._session, self._step = uuid.uuid4().hex, 0  # the episode of which the server draws traces
        self._lock = threading.Lock()
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._options: dict[str, Any] = {"client_id": uuid.uuid4().hex, "latest_only": True} if latest_only else {}
        if constrain_actions is not None:
            self._options["constrain_actions"] = constrain_actions

    def act(self, image: Any, instruction: str, proprio: Any = None) -> np.ndarray:
        """Return the next action, or chunk of actions, bitwise equal to that of the served policy.

        Args:
            image: Camera image: PIL, numpy ``(H, W, 3)`` uint8 or float in [0, 1], torch, or a path on *this* machine
                (rotated by its EXIF orientation; a PIL image is not rotated); for a model of several cameras the list
                of their images, in the order of training. For a model of several moments the images of this one, whose
                history this client keeps from the last ``reset`` on; or all images, the oldest moment first. For a
                TraceVLA whose traces the server draws the frame of its camera.
            instruction: What the robot should do.
            proprio: The robot's state in its own units, ``(proprio_dim,)``, for models that were trained with it.

        Returns:
            float64 ``(action_dim,)`` or ``(chunk, action_dim)`` in robot units.

        Raises:
            RequestRejectedError: The server rejects the request; ``field`` names the invalid field. Also a ValueError.
            NoActionPredictedError: The model's output is no action. Also a RequestRejectedError.
            ServerUnavailableError: No result within ``timeout`` and ``retries``. Also a ConnectionError.
            PolicyServerError: The server failed, or its reply is no finite action.
            ValueError: The instruction is no text, or an image does not have 8 bits a channel.
            TypeError: The image is none of the accepted types.
        """
        if not isinstance(instruction, str):
            raise ValueError(f"The instruction must be text, got {type(instruction).__name__}: {instruction!r}.")
        deadline = time.monotonic() + self.timeout
        model = self._describe_model(deadline)
        if not isinstance(image, _Moments):  # of an ActionQueue, which keeps a history of its own
            image = self._history.append(image)
        if isinstance(image, _Moments):
            image = _images_of_model(image, model)
        has_cameras = _is_several(image)
        fields: dict[str, Any] = {
            "image": [_encode_image(camera) for camera in image] if has_cameras else _encode_image(image),
            "instruction": instruction,
            **self._options,
        }
        if model.get("draws_traces") and not (has_cameras and len(image) > 1):
            with self._lock:
                fields |= {"session": self._session, "step": self._step}
                self._step += 1
        if proprio is not None:
            state = proprio.detach().cpu() if hasattr(proprio, "detach") else proprio
            fields["proprio"] = encode_array(np.asarray(state, np.float64))
        if self.unnorm_key is not None:
            fields["unnorm_key"] = self.unnorm_key
        return _decode_action(self._request("POST", "/act", fields, deadline))

    def reset(self) -> None:
        """Begin an episode: forget the images and the trace of the previous one."""
        self._history.clear()
        with self._lock:
            self._session, self._step = uuid.uuid4().hex, 0

    def new_history(self) -> _History:
        """Return an empty history of images, which ``ActionQueue`` keeps."""
        return _History(self)

    def _describe_model(self, deadline: float) -> dict[str, Any]:
        """Return ``/info``, which the server is asked for once."""
        if self._model is None:
            self._model = self._info(deadline)
        return self._model

    def info(self) -> dict[str, Any]:
        """Return the server's ``/info``: model, datasets, units, cameras, limits; raises as ``act``."""
        return self._info(time.monotonic() + self.timeout)

    def _info(self, deadline: float) -> dict[str, Any]:
        info = self._request("GET", "/info", None, deadline)
        if not isinstance(info, dict):
            raise PolicyServerError(f"The server's /info must be an object, got {str(info)[:200]}")
        return info

    def close(self) -> None:
        """Close this thread's connection; the next request opens a new one."""
        connection = getattr(self._thread_local, "connection", None)
        if connection is not None:
            connection.close()
            self._thread_local.connection = None

    def _request(self, method: str, path: str, fields: dict[str, Any] | None, deadline: float) -> Any:
        """Return the JSON of the reply; retry while retries and time are left."""
        text = None if fields is None else json.dumps(fields)[1:]
        backoff, tries = MIN_BACKOFF_SECONDS, 0
        while True:
            tries += 1
            try:
                return self._request_once(method, path, text, deadline)
            except ServerUnavailableError as error:
                wait = max(backoff * random.uniform(0.5, 1.0), error.retry_after)
                if tries > self.retries or wait >= deadline - time.monotonic():
                    error.args = (f"{error} (tried {tries} times within {self.timeout} s)",)
                    raise
            time.sleep(wait)
            backoff = min(2 * backoff, MAX_BACKOFF_SECONDS)

    def _request_once(self, method: str, path: str, text: str | None, deadline: float) -> Any:
        """Return the JSON of a reply with status 200; raise an error for any other reply."""
        is_reused = getattr(self._thread_local, "connection", None) is not None
        try:
            status, retry_after, body = self._exchange(method, path, text, deadline)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if is_reused and isinstance(error, ConnectionError):  # the server closed an idle connection
                return self._request_once(method, path, text, deadline)
            raise ServerUnavailableError(f"{self.url} did not answer: {type(error).__name__}: {error}") from error
        reply = _parse_json(body)
        if status == 200 and reply is not None:
            return reply
        failure = _error_from_reply(self.url, status, reply, body)
        if isinstance(failure, ServerUnavailableError):
            failure.retry_after = retry_after
        raise failure

    def _exchange(self, method: str, path: str, text: str | None, deadline: float) -> tuple[int, float, bytes]:
        """Send a request and read the reply before the deadline; return status, seconds of Retry-After and body."""
        connection = self._connect(deadline)
        body = None if text is None else f'{{"deadline_ms": {_remaining(deadline) * 1000:.3f}, {text}'.encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have replied before the body's end
            connection.request(method, self._base_path + path, body, self._headers)
        connection.sock.settimeout(_remaining(deadline))
        reply = connection.getresponse()
        content = bytearray()
        while chunk := reply.read1(65536):
            content += chunk
            if len(content) > MAX_REPLY_BYTES:
                raise http.client.HTTPException(f"a reply of more than {MAX_REPLY_BYTES} bytes")
            if connection.sock is not None:
                connection.sock.settimeout(_remaining(deadline))
        if reply.length:
            raise http.client.IncompleteRead(bytes(content), reply.length)
        reply.close()  # else the connection would not take the next request
        if reply.will_close:
            self.close()
        return reply.status, _parse_retry_after(reply.getheader("retry-after")), bytes(content)

    def _connect(self, deadline: float) -> http.client.HTTPConnection:
        """Return this thread's connection, opened if necessary, with a timeout at the deadline."""
        connection: http.client.HTTPConnection | None = getattr(self._thread_local, "connection", None)
        if connection is None:
            connection_class = http.client.HTTPSConnection if self._is_https else http.client.HTTPConnection
            connection = connection_class(self._hostname, self._port, timeout=_remaining(deadline))
            self._thread_local.connection = connection
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sock.settimeout(_remaining(deadline))
        return connection


class _Moments(list[list[Any]]):
    """The images of the last moments, oldest first, from which ``act`` takes those that the model needs."""


class _History:
    """The images of an episode's last moments, as ``ImageHistory`` keeps them, which this file must not import.

    It never waits: until the client knows the server's model, it keeps ``MAX_MOMENTS``.

    Args:
        client: The client.
    """

    def __init__(self, client: PolicyClient) -> None:
        self._client, self._lock = client, threading.Lock()
        self._moments = _Moments()

    def clear(self) -> None:
        """Begin an episode."""
        with self._lock:
            self._moments = _Moments()  # the old ones may be of a prediction that runs

    def append(self, image: Any) -> Any:
        """Add the images of this moment; return what ``PolicyClient.act`` takes."""
        length = MAX_MOMENTS if self._client._model is None else self._client._model.get("history_length", 1)
        if length == 1:
            return image
        # A camera may write every frame into one array.
        images = [one.copy() if isinstance(one, np.ndarray) else one for one in _as_list(image)]
        with self._lock:
            self._moments = _Moments([*self._moments, images][-length:])
            return self._moments


def _images_of_model(moments: _Moments, model: dict[str, Any]) -> Any:
    """Return the images that a model takes, with the first steps of an episode padded as its server says.

    Args:
        moments: Images of the last moments; all images of all moments stand in the last one alone.
        model: The server's ``/info``; one of an earlier version says nothing of moments: its models take one.
    """
    length, num_cameras = model.get("history_length", 1), model.get("images_per_moment", 1)
    newest = moments[-1]
    if length == 1 or len(newest) != num_cameras:  # the server refuses other numbers
        return newest if len(newest) > 1 else newest[0]
    kept = [moment for moment in moments if len(moment) == num_cameras][-length:]
    missing = length - len(kept)
    pads_end = model.get("history_padding") == "end"
    padded = kept + [kept[-1]] * missing if pads_end else [kept[0]] * missing + kept
    return [image for moment in padded for image in moment]


def _as_list(image: Any) -> list[Any]:
    """Return the images of a list, or stacked ones, or a single image as a list."""
    return list(image) if _is_several(image) else [image]


def _is_several(image: Any) -> bool:
    """Return whether images are a list, or stacked."""
    return isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4


def encode_array(array: np.ndarray) -> dict[str, Any]:
    """Return an array in json_numpy's encoding: lossless, without the time for compression."""
    data = base64.b64encode(np.ascontiguousarray(array).data).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": array.shape}


def _encode_image(image: Any) -> dict[str, Any]:
    return encode_array(image_pixels(image))


def image_pixels(image: Any) -> np.ndarray:
    """Return an image as an array; files and PIL images become RGB, as the policy itself would convert them.

    Raises:
        ValueError: A picture file has several frames, or not 8 bits a channel.
        TypeError: The image is none of the accepted types.
    """
    if isinstance(image, (str, os.PathLike)):
        image = _open_picture(image)
    if isinstance(image, Image.Image):
        _require_eight_bits(image)
        return np.asarray(image.convert("RGB"))
    if hasattr(image, "detach") and hasattr(image, "cpu"):  # torch, possibly with channels first
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
        if image.ndim == 3 and image.shape[0] in (1, 3, 4):
            image = image.transpose(1, 2, 0)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"An image must be a PIL image, a numpy array, a torch tensor or a path, got {type(image)}.")
    return image


def _open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Return the picture of a file, rotated by its EXIF orientation."""
    with Image.open(path) as picture:
        if getattr(picture, "is_animated", False) and picture.format != "MPO":
            num_frames = getattr(picture, "n_frames", 1)
            raise ValueError(f"A picture file must hold one frame, got {num_frames}; give the one you mean.")
        _require_eight_bits(picture)
        picture.load()  # rotates a TIFF file
        transpose = _exif_transpose(picture)
        return picture.copy() if transpose is None else picture.transpose(transpose)


def _require_eight_bits(picture: Image.Image) -> None:
    """Raise ValueError as ``images_openvla.require_eight_bits`` does, which this file must not import."""
    mode = next(iter(re.findall(r"\w+;16\w*", str(getattr(picture, "tile", "")))), picture.mode)
    if mode != picture.mode or not ImageMode.getmode(mode).typestr.endswith("1"):
        raise ValueError(f"A picture must have 8 bits a channel, got mode {mode}; give 8-bit RGB or grey.")


def _exif_transpose(picture: Image.Image) -> Image.Transpose | None:
    """Return the transpose for a picture's EXIF orientation; None if there is none, or the EXIF data is broken."""
    try:
        orientation: Any = picture.getexif().get(EXIF_ORIENTATION)
        return EXIF_TRANSPOSES.get(orientation)
    except Exception:  # broken data raises any error of Pillow's parsers of TIFF and XML
        return None


def _remaining(deadline: float) -> float:
    """Return the seconds until a deadline; raise TimeoutError if it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


def _error_from_reply(url: str, status: int, reply: Any, body: bytes) -> PolicyServerError:
    """Return the error for a reply that is not a success."""
    error = reply.get("error") if isinstance(reply, dict) else None
    if not isinstance(error, dict):
        error = {"message": f"{url} replied {body[:200]!r}"}
    error_class: type[PolicyServerError] = PolicyServerError
    if error.get("code") == NoActionPredictedError.code:
        error_class = NoActionPredictedError
    elif 400 <= status < 500:
        error_class = RequestRejectedError
    elif status in (503, 504):
        error_class = ServerUnavailableError
    return error_class(f"{status}: {error.get('message')}", status, error.get("field"), error.get("id"))


def _decode_action(reply: Any) -> np.ndarray:
    """Return the float64 action, or chunk of actions, of a reply to ``/act``."""
    try:
        data, dtype, shape = base64.b64decode(reply["__numpy__"], validate=True), reply["dtype"], reply["shape"]
        if dtype != "<f8":
            raise ValueError(f"its dtype must be <f8, got {dtype!r:.200}")
        if not isinstance(shape, list) or any(type(size) is not int for size in shape):
            raise ValueError(f"its shape must be a list of sizes, got {shape!r:.200}")
        action = np.frombuffer(data, "<f8").reshape(shape).copy()
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise PolicyServerError(f"The reply is no action: {str(reply)[:200]}") from error
    if action.ndim not in (1, 2) or action.size == 0 or not np.isfinite(action).all():
        raise PolicyServerError(f"The reply is no finite action or chunk of actions: {action.tolist()}")
    return action


def _parse_json(body: bytes) -> Any:
    """Return a body's JSON; None if it is not JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _parse_retry_after(header: str | None) -> float:
    """Return the seconds of a Retry-After header; 0 for none, or for a date."""
    return float(header) if header is not None and header.isdecimal() else 0.0
