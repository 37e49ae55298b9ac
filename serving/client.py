"""``PolicyClient``: a policy that runs elsewhere, behind ``openvla serve``.

It needs numpy, Pillow and the standard library only, and nothing else of this package: the file can be copied to a
robot's computer that has no torch. Each thread keeps a connection, and opens another whenever the server was away.
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
# How viewers turn a picture, by its EXIF orientation; this file needs no other, so they stand here again.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BACKOFF_SECONDS = (0.05, 2.0)  # before the first retry and at most; doubled each time, with some chance in it
LARGEST_REPLY = 64 * 2**20


class PolicyServerError(RuntimeError):
    """The server did not give an action.

    Attributes:
        status: Of HTTP; None where there was no reply.
        field: Of the request, where one is at fault.
        id: Under which the server's log has more.
        code: "no_action" where the model gave no action, else None.
    """

    code: str | None = None

    def __init__(
        self, message: str, status: int | None = None, field: str | None = None, id: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.field, self.id = status, field, id


class RequestRefused(PolicyServerError, ValueError):
    """The request is wrong (4xx); the same one would be refused again."""


class NoActionGiven(RequestRefused):
    """An answer of the served model that is no action: it ended early, or holds words. Stop the robot."""

    code = "no_action"


class ServerUnavailable(PolicyServerError, ConnectionError):
    """No answer in time: no connection, an overloaded or a draining server, whatever was retried.

    Attributes:
        retry_after: Seconds that the server asks to wait.
    """

    retry_after = 0.0


class PolicyClient:
    """Stands where a ``Policy`` stands.

    A loop that must keep its rate does not wait for the network: it plays the last chunk and asks for the next
    meanwhile; an answer that comes late loses the actions whose moment has passed::

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
        token: Its bearer token.
        timeout: Seconds for an answer, all retries together; the server drops what it cannot answer by then.
        retries: How often a request is sent again after a connection error or a 503. Asking twice does no harm: the
            server remembers nothing.
        unnorm_key: Whose statistics give robot units; None is the server's default.
        constrain_actions: Let the model choose among action tokens only; None is as the server was started.
        latest_only: Let the server drop this client's frames for newer ones; a dropped one is a ``RequestRefused``
            with status 409.

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
        self._parts, self._own = parts, threading.local()
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._client: dict[str, Any] = {"client_id": uuid.uuid4().hex, "latest_only": True} if latest_only else {}
        if constrain_actions is not None:
            self._client["constrain_actions"] = constrain_actions

    def act(self, image: Any, instruction: str, proprio: Any = None) -> np.ndarray:
        """The next action, or chunk of actions, equal in every bit to the served policy's own.

        Args:
            image: Camera image: PIL, numpy ``(H, W, 3)`` uint8 or float in [0, 1], torch, or a path on *this* machine
                (turned as its EXIF says; a PIL image is taken as its pixels lie);
                for a model of several cameras the list of their images, in the order of training.
            instruction: What the robot should do.
            proprio: The robot's state in its own units, ``(proprio_dim,)``, for models that were trained with it.

        Returns:
            float64 ``(action_dim,)`` or ``(chunk, action_dim)`` in robot units.

        Raises:
            RequestRefused: The server refuses it; ``field`` names what is wrong. A ValueError too.
            NoActionGiven: What the model gave is no action. A RequestRefused too.
            ServerUnavailable: No answer within ``timeout`` and ``retries``. A ConnectionError too.
            PolicyServerError: The server failed, or its reply is no finite action.
            ValueError: The instruction is no text, or a picture has not 8 bits a channel.
            TypeError: Not an image at all.
        """
        if not isinstance(instruction, str):
            raise ValueError(f"The instruction must be text, got {type(instruction).__name__}: {instruction!r}.")
        several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
        fields = {"image": [_encoded(_pixels(one)) for one in image] if several else _encoded(_pixels(image))}
        fields |= {"instruction": instruction, **self._client}
        if proprio is not None:
            detached = proprio.detach().cpu() if hasattr(proprio, "detach") else proprio
            fields["proprio"] = _encoded(np.asarray(detached, np.float64))
        if self.unnorm_key is not None:
            fields["unnorm_key"] = self.unnorm_key
        return _action(self._asked("POST", "/act", fields))

    def reset(self) -> None:
        """Begin an episode. Neither end remembers anything from one image to the next."""

    def info(self) -> dict[str, Any]:
        """What the server says of its model: datasets, units, cameras, limits; raises as ``act``."""
        info = self._asked("GET", "/info", None)
        if not isinstance(info, dict):
            raise PolicyServerError(f"The server's /info must be an object, got {str(info)[:200]}")
        return info

    def close(self) -> None:
        """Close this thread's connection; the next request opens another."""
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            connection.close()
            self._own.connection = None

    def _asked(self, method: str, path: str, fields: dict[str, Any] | None) -> Any:
        """The reply's JSON, after as many tries as are allowed."""
        end = time.monotonic() + self.timeout
        text = None if fields is None else json.dumps(fields)[1:]
        pause, longest = BACKOFF_SECONDS
        for tries in range(1, self.retries + 2):
            try:
                return self._tried(method, path, text, end)
            except ServerUnavailable as error:
                wait = max(pause * random.uniform(0.5, 1.0), error.retry_after)
                if tries > self.retries or wait >= end - time.monotonic():
                    error.args = (f"{error} (tried {tries} times within {self.timeout} s)",)
                    raise
            time.sleep(wait)
            pause = min(2 * pause, longest)
        return None

    def _tried(self, method: str, path: str, text: str | None, end: float) -> Any:
        kept = getattr(self._own, "connection", None) is not None
        try:
            status, again, body = self._exchanged(method, path, text, end)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if kept and isinstance(error, ConnectionError):  # servers close idle connections: that is no absence
                return self._tried(method, path, text, end)
            raise ServerUnavailable(f"{self.url} did not answer: {type(error).__name__}: {error}") from error
        reply = _parsed(body)
        if status == 200 and reply is not None:
            return reply
        details = reply.get("error") if isinstance(reply, dict) else None
        details = details if isinstance(details, dict) else {"message": f"{self.url} replied {body[:200]!r}"}
        known = 400 <= status < 500
        kind = RequestRefused if known else ServerUnavailable if status in (503, 504) else PolicyServerError
        if details.get("code") == NoActionGiven.code:
            kind = NoActionGiven
        failed = kind(f"{status}: {details.get('message')}", status, details.get("field"), details.get("id"))
        if isinstance(failed, ServerUnavailable):
            failed.retry_after = again
        raise failed

    def _exchanged(self, method: str, path: str, text: str | None, end: float) -> tuple[int, float, bytes]:
        """One request and its reply: status, seconds of Retry-After, body; all of it before ``end``."""
        connection = getattr(self._own, "connection", None)
        if connection is None:
            secure = self._parts.scheme == "https"
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            self._own.connection = connection = kind(self._parts.hostname, self._parts.port, timeout=_left(end))
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sock.settimeout(_left(end))
        body = None if text is None else f'{{"deadline_ms": {_left(end) * 1000:.3f}, {text}'.encode()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have replied before the body's end
            connection.request(method, self._parts.path.rstrip("/") + path, body, self._headers)
        connection.sock.settimeout(_left(end))
        reply = connection.getresponse()
        read = bytearray()
        while chunk := reply.read1(65536):
            read += chunk
            if len(read) > LARGEST_REPLY:
                raise http.client.HTTPException(f"a reply of more than {LARGEST_REPLY} bytes")
            if connection.sock is not None:
                connection.sock.settimeout(_left(end))
        if reply.length:
            raise http.client.IncompleteRead(bytes(read), reply.length)
        reply.close()  # else the connection would not take the next request
        if reply.will_close:
            self.close()
        return reply.status, _seconds(reply.getheader("retry-after")), bytes(read)


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _pixels(image: Any) -> np.ndarray:
    """Return an image as an array; files and PIL images become RGB, as the policy itself would make them."""
    if isinstance(image, (str, os.PathLike)):
        with Image.open(image) as opened:
            if getattr(opened, "is_animated", False) and opened.format != "MPO":
                raise ValueError(f"A picture file must hold one frame, got {opened.n_frames}; give the one you mean.")
            _require_eight_bits(opened)
            opened.load()  # a TIFF file turns itself then
            turn = _turn(opened)
            image = opened.copy() if turn is None else opened.transpose(turn)
    if isinstance(image, Image.Image):
        _require_eight_bits(image)
        return np.asarray(image.convert("RGB"))
    if hasattr(image, "detach") and hasattr(image, "cpu"):  # torch, which may have its channels first
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
        if image.ndim == 3 and image.shape[0] in (1, 3, 4):
            image = image.transpose(1, 2, 0)
    if not isinstance(image, np.ndarray):
        raise TypeError(f"An image must be a PIL image, a numpy array, a torch tensor or a path, got {type(image)}.")
    return image


def _require_eight_bits(picture: Image.Image) -> None:
    """Raise ValueError as images_openvla does, which a robot may not have."""
    mode = next(iter(re.findall(r"\w+;16\w*", str(getattr(picture, "tile", "")))), picture.mode)
    if mode != picture.mode or not ImageMode.getmode(mode).typestr.endswith("1"):
        raise ValueError(f"A picture must have 8 bits a channel, got mode {mode}; give 8-bit RGB or grey.")


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """Return how viewers turn a picture; None for not at all, also where its EXIF data cannot be read."""
    try:
        return TURNS.get(picture.getexif().get(EXIF_ORIENTATION))
    except Exception:  # broken data raises whatever Pillow's parsers of TIFF and XML raise
        return None


def _encoded(array: np.ndarray) -> dict[str, Any]:
    """As json_numpy writes it: no loss, and no time spent on compressing."""
    data = base64.b64encode(np.ascontiguousarray(array)).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": array.shape}


def _action(reply: Any) -> np.ndarray:
    """float64 of the reply to ``/act``."""
    try:
        data, dtype, shape = base64.b64decode(reply["__numpy__"], validate=True), reply["dtype"], reply["shape"]
        if not isinstance(shape, list) or any(type(size) is not int for size in shape):
            raise ValueError(f"its shape must be a list of sizes, got {shape!r:.200}")
        action = np.frombuffer(data, {"<f8": "<f8"}[dtype]).reshape(shape).copy()
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise PolicyServerError(f"The reply is no action: {str(reply)[:200]}") from error
    if action.ndim not in (1, 2) or action.size == 0 or not np.isfinite(action).all():
        raise PolicyServerError(f"The reply is no finite action or chunk of actions: {action.tolist()}")
    return action


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _seconds(header: str | None) -> float:
    """Of Retry-After; a date counts as none."""
    return float(header) if header is not None and header.isdecimal() else 0.0
