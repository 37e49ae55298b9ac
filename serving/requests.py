"""Parse requests in the formats that robot clients send, and encode replies: json_numpy, plain JSON, msgpack.

Nothing in a request is unpickled, and no path or URL in it is opened.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import msgpack
import numpy as np
from PIL import Image

from ..actions_openvla import nearest_name
from ..errors_openvla import OpenVLAError, OpenVLAValueError
from ..images_openvla import as_images, require_eight_bits, require_one_frame, upright_rgb
from ..inference.openpi_messages import NUMERIC_DTYPE
from .cli import Limits

# Field names of the clients of OpenVLA's server, of OpenVLA-OFT's (every field with "wrist" in its name is a camera, in
# the order sent) and of openpi's, which puts a prefix before these names.
IMAGE_FIELDS = ("image", "full_image")
WRIST = "wrist"
PROPRIO_FIELDS = ("state", "proprio")
INSTRUCTION_FIELDS = ("instruction", "prompt")
OPENPI_PREFIX = "observation/"
SESSION_FIELDS = ("session", "step")
OPTION_FIELDS = ("unnorm_key", "details", "client_id", "latest_only", "deadline_ms", "constrain_actions")
KNOWN_FIELDS = (*IMAGE_FIELDS, *PROPRIO_FIELDS, *INSTRUCTION_FIELDS, *OPTION_FIELDS, *SESSION_FIELDS, "traced_image")

PICTURE_FORMATS = ("PNG", "JPEG")
IMAGE_FORMATS = (
    "base64 of a PNG or JPEG (with or without data:image/png;base64,), rows of pixels of whole numbers 0 to 255, or an "
    "array encoded by json_numpy; paths and URLs are never opened"
)
MAX_ASPECT_RATIO = 16  # a processor that pads to a square or resizes the shorter side would make a strip huge
MAX_CAMERAS = 16
MAX_ARRAY_DIMENSIONS = 4
MAX_TEXT_CHARACTERS = 200  # of unnorm_key, client_id and session
MAX_STEP = 10**9
MAX_DEADLINE_MS = 1e9


class RequestError(OpenVLAValueError):
    """A request that is rejected.

    Attributes:
        field: The invalid field, as the client named it.
        status: HTTP status of the reply.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 422) -> None:
        super().__init__(_escape_surrogates(message))
        self.field, self.status = None if field is None else _escape_surrogates(field), status


def _escape_surrogates(text: str) -> str:
    """Return text that can be sent as UTF-8: a field's name may hold half of a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass
class ActRequest:
    """A parsed request, checked as far as possible without the model.

    Attributes:
        images: RGB, the main camera first.
        instruction: What the robot should do.
        unnorm_key: Dataset whose statistics un-normalise the action; None for the server's default.
        proprio: float64 ``(proprio_dim,)`` in the robot's units.
        details: Reply with ``ActionDetails`` in place of the action alone.
        client_id: Name of the client that sent the frame.
        latest_only: Drop this request when a newer frame of the same client arrives.
        timeout_s: Seconds from arrival to result; None for the server's.
        encoding: Encoding of the reply; "double" is json_numpy in a JSON string.
        as_list: Reply with a list of actions also for a single one, as OpenVLA-OFT's server does.
        constrain_actions: Choose among action tokens only; None for the server's default.
        session: Name of the session whose next step this is; None for a request by itself.
        step: Number of the step in the session's episode; 0 begins an episode.
        traced_image: Reply with the image that the trace is drawn on, too.
        field_names: Names that the client used for "image", "proprio" and "instruction".
    """

    images: list[Image.Image]
    instruction: str
    unnorm_key: str | None = None
    proprio: np.ndarray | None = None
    details: bool = False
    client_id: str | None = None
    latest_only: bool = False
    timeout_s: float | None = None
    encoding: Literal["plain", "json_numpy", "double"] = "plain"
    as_list: bool = False
    constrain_actions: bool | None = None
    session: str | None = None
    step: int = 0
    traced_image: bool = False
    field_names: dict[str, str] = field(default_factory=dict)


def parse_json_request(body: bytes, limits: Limits) -> ActRequest:
    """Parse the body of ``POST /act``: json_numpy, json_numpy in ``{"encoded": "..."}``, or plain JSON.

    Raises:
        RequestError: The request is malformed; the message names the field.
    """
    fields = _load_json_object(body, None)
    is_double_encoded = "encoded" in fields
    if is_double_encoded:
        if set(fields) != {"encoded"} or not isinstance(fields["encoded"], str):
            raise RequestError("encoded must be a string, and the only field.", "encoded")
        fields = _load_json_object(fields["encoded"], "encoded")
    has_encoded_array = any(_contains_encoded_array(value) for value in fields.values())
    request = _parse_fields(fields, limits)
    request.encoding = "double" if is_double_encoded else "json_numpy" if has_encoded_array else "plain"
    return request


def parse_msgpack_request(frame: bytes, limits: Limits) -> ActRequest:
    """Parse a frame of openpi's WebSocket protocol.

    Raises:
        RequestError: The request is malformed; the message names the field.
    """
    try:
        fields = msgpack.unpackb(frame, object_pairs_hook=_decode_msgpack_map, max_ext_len=0)
    except RequestError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        message = f"The frame must be msgpack, got {len(frame)} bytes that are not: {error}"
        raise RequestError(message, None, 400) from error
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise RequestError(f"The frame must be a map with text keys, got {type(fields).__name__}.", None, 400)
    return _parse_fields(fields, limits)


def encode_reply(request: ActRequest, actions: np.ndarray) -> Any:
    """Return actions in the encoding of the request, ready for JSON.

    Args:
        request: The request.
        actions: float64 ``(action_dim,)`` or ``(chunk, action_dim)``.
    """
    if not request.as_list:
        if request.encoding == "plain":
            return actions.tolist()
        encoded: Any = encode_array(actions)
    else:
        chunk = np.atleast_2d(actions)
        if request.encoding == "plain":
            return chunk.tolist()
        encoded = [encode_array(action) for action in chunk]
    return json.dumps(encoded) if request.encoding == "double" else encoded


def encode_array(array: np.ndarray) -> dict[str, Any]:
    """Return an array in json_numpy's encoding."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def _load_json_object(text: bytes | str, name: str | None) -> dict[str, Any]:
    subject = name or "The body"

    def reject_constant(constant: str) -> NoReturn:
        raise RequestError(f"{subject} holds {constant}, which JSON does not know; numbers must be finite.", name, 400)

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        fields = json.loads(text, parse_constant=reject_constant, object_pairs_hook=_dict_without_duplicates)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{subject} must be JSON, got {len(text)} bytes that are not: {error}", name, 400) from error
    if not isinstance(fields, dict):
        raise RequestError(f"{subject} must be a JSON object, got {type(fields).__name__}.", name)
    return fields


def _parse_fields(fields: dict[str, Any], limits: Limits) -> ActRequest:
    """Parse the fields of a request in any of the formats."""
    names = {name.removeprefix(OPENPI_PREFIX): name for name in fields}  # without prefix -> as sent
    if len(names) < len(fields):
        raise RequestError(f"A field was sent twice, with and without {OPENPI_PREFIX!r}: {sorted(fields)}.")
    wrist_names = [sent for name, sent in names.items() if WRIST in name]
    _require_known_fields(names)
    image_name = _require_one_field(names, IMAGE_FIELDS)
    instruction_name = _require_one_field(names, INSTRUCTION_FIELDS)
    proprio_name = _find_field(names, PROPRIO_FIELDS)
    proprio = None if proprio_name is None else fields[proprio_name]
    request = ActRequest(
        images=parse_images(fields[image_name], image_name, limits),
        instruction=_parse_instruction(fields[instruction_name], instruction_name, limits),
        proprio=None if proprio_name is None or proprio is None else _parse_proprio(proprio, proprio_name),
        unnorm_key=_parse_optional_text(fields, "unnorm_key"),
        details=_parse_bool(fields, "details"),
        constrain_actions=None if fields.get("constrain_actions") is None else _parse_bool(fields, "constrain_actions"),
        client_id=_parse_optional_text(fields, "client_id"),
        latest_only=_parse_bool(fields, "latest_only"),
        timeout_s=_parse_timeout(fields.get("deadline_ms")),
        session=_parse_optional_text(fields, "session"),
        step=_parse_step(fields),
        traced_image=_parse_bool(fields, "traced_image"),
        as_list="full_image" in names or any(name.startswith(OPENPI_PREFIX) for name in fields),
        field_names={
            "image": image_name,
            "proprio": proprio_name or PROPRIO_FIELDS[0],
            "instruction": instruction_name,
        },
    )
    for name in wrist_names:
        request.images += parse_images(fields[name], name, limits)
    if request.latest_only and request.client_id is None:
        raise RequestError("latest_only needs client_id: whose older frames are to be dropped?", "client_id")
    if request.traced_image and not request.details:
        raise RequestError("traced_image needs details: true, whose reply has a field for it.", "details")
    return request


def _require_known_fields(names: dict[str, str]) -> None:
    for name, sent in names.items():
        if name not in KNOWN_FIELDS and WRIST not in name:
            nearest = nearest_name(name, KNOWN_FIELDS)
            hint = f" Did you mean {nearest!r}?" if nearest else ""
            known = [*KNOWN_FIELDS, "wrist_image"]
            raise RequestError(f"Unknown field {_preview(sent)}.{hint} Known: {known}.", sent)


def _find_field(names: dict[str, str], synonyms: tuple[str, ...]) -> str | None:
    """Return the one of several synonymous fields that was sent, as it was sent; None if none was."""
    sent = [names[name] for name in synonyms if name in names]
    if len(sent) > 1:
        raise RequestError(f"{' and '.join(sent)} mean the same; send one of them.", sent[1])
    return sent[0] if sent else None


def _require_one_field(names: dict[str, str], synonyms: tuple[str, ...]) -> str:
    sent = _find_field(names, synonyms)
    if sent is None:
        raise RequestError(f"{synonyms[0]} is missing (or {' or '.join(synonyms[1:])}).", synonyms[0])
    return sent


def _parse_instruction(value: Any, name: str, limits: Limits) -> str:
    if isinstance(value, bytes):
        raise RequestError(f"{name} must be text, got bytes; send a string (UTF-8).", name)
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{name} must be text that says what to do, got {_preview(value)}.", name)
    if len(value) > limits.instruction_characters:
        raise RequestError(
            f"{name} has {len(value)} characters; at most {limits.instruction_characters} are allowed.", name
        )
    return _require_encodable(value, name)


def _parse_optional_text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= MAX_TEXT_CHARACTERS:
        raise RequestError(
            f"{name} must be text of 1 to {MAX_TEXT_CHARACTERS} characters, or left out, got {_preview(value)}.", name
        )
    return _require_encodable(value, name)


def _require_encodable(value: str, name: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} holds half of a surrogate pair, which is no character: {error}", name) from error
    return value


def _parse_bool(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {_preview(value)}.", name)
    return value


def _parse_step(fields: dict[str, Any]) -> int:
    """Return the number of a session's step; 0 without a session."""
    step = fields.get("step")
    if (step is None) != (fields.get("session") is None):
        missing = "step" if step is None else "session"
        raise RequestError("session and step go together: send both, or none.", missing)
    if step is None:
        return 0
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MAX_STEP:
        raise RequestError(f"step must be a whole number from 0 to {MAX_STEP}, got {_preview(step)}.", "step")
    return step


def _parse_timeout(value: Any) -> float | None:
    """Return ``deadline_ms`` in seconds."""
    if value is None:
        return None
    if not _is_number(value) or not 0 < value < MAX_DEADLINE_MS:
        raise RequestError(
            f"deadline_ms must be a number of milliseconds above 0, got {_preview(value)}.", "deadline_ms"
        )
    return value / 1000


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parse_proprio(value: Any, name: str) -> np.ndarray:
    """Return a state as float64 ``(n,)``, finite."""
    if isinstance(value, list) and all(map(_is_number, value)):
        try:
            value = np.array(value, np.float64)
        except OverflowError as error:
            raise RequestError(f"{name} holds a number beyond float64: {error}", name) from error
    array = _decode_array(value, name, "a list of numbers, or an encoded array")
    if array.ndim != 1 or array.size == 0:
        raise RequestError(f"{name} must be flat, (n,), got shape {array.shape}.", name)
    if not np.isfinite(array).all():
        raise RequestError(f"{name} must be finite, got {array.tolist()[:32]}.", name)
    return array.astype(np.float64)


def parse_images(value: Any, name: str, limits: Limits) -> list[Image.Image]:
    """Return the RGB images of an image field: one, or one for each of several cameras.

    Raises:
        RequestError: An image is malformed or too large.
    """
    if isinstance(value, np.ndarray) and value.ndim == 4:
        value = list(value)
    first, depth = value, 0
    while isinstance(first, list) and first and depth < 4:
        first, depth = first[0], depth + 1
    has_cameras = depth == 4 or depth == 1 and not _is_number(first)
    cameras = value if has_cameras else [value]
    if len(cameras) > MAX_CAMERAS:
        raise RequestError(f"{name} holds {len(cameras)} images; no model here takes more than {MAX_CAMERAS}.", name)
    return [parse_image(camera, name, limits) for camera in cameras]


def parse_image(value: Any, name: str, limits: Limits) -> Image.Image:
    """Return one RGB image from base64 of a picture file, nested lists of pixels, or an array.

    Raises:
        RequestError: The image is malformed or too large.
    """
    if isinstance(value, str):
        return _decode_picture(value, name, limits)
    array = _pixels_from_lists(value, name) if isinstance(value, list) else _decode_array(value, name, IMAGE_FORMATS)
    if array.ndim not in (2, 3):
        raise RequestError(f"{name} must have shape (height, width, 3), got {array.shape}.", name)
    _require_image_size(array.shape[1], array.shape[0], name, limits)
    try:
        return as_images(array)[0]
    except OpenVLAError as error:
        raise RequestError(f"{name}: {error}", name) from error


def _decode_picture(text: str, name: str, limits: Limits) -> Image.Image:
    """Return a PNG or JPEG from base64; its size is checked before it is decoded."""
    head, comma, rest = text.partition(",") if text.startswith("data:") else ("", "", text)
    if text.startswith("data:") and not (comma and head.endswith(";base64")):
        raise RequestError(f"{name}: a data URL must be data:image/png;base64,..., got {_preview(head)}.", name)
    try:
        data = base64.b64decode("".join(rest.split()), validate=True)
        image = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
        _require_image_size(*image.size, name, limits)
        try:
            require_one_frame(require_eight_bits(image))
        except OpenVLAError as error:
            raise RequestError(f"{name}: {error}", name) from error
        return upright_rgb(image)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise RequestError(f"{name} is too large: {error}", name, 413) from error
    except (ValueError, OSError, SyntaxError, binascii.Error) as error:  # Pillow's errors for broken files
        raise RequestError(f"{name} must be {IMAGE_FORMATS}; got {_preview(text)}: {error}", name) from error


def _require_image_size(width: int, height: int, name: str, limits: Limits) -> None:
    short, long = sorted((width, height))
    if short < 1:
        raise RequestError(f"{name} has no pixels: {width} x {height}.", name)
    if long > limits.image_side:
        raise RequestError(
            f"{name} has {width} x {height} pixels; at most {limits.image_side} a side are allowed.", name, 413
        )
    if long > MAX_ASPECT_RATIO * short:
        raise RequestError(f"{name} is a strip of {width} x {height} pixels; at most {MAX_ASPECT_RATIO} : 1.", name)


def _pixels_from_lists(value: list[Any], name: str) -> np.ndarray:
    """Return a uint8 array from nested lists of whole numbers.

    Floats are rejected: JavaScript writes 1.0 as 1, so their range could be [0, 1] or [0, 255].
    """
    flat: Any = value
    while isinstance(flat, list) and flat and isinstance(flat[0], list):
        if not all(isinstance(row, list) for row in flat):
            raise RequestError(f"{name}: rows must have equal lengths.", name)
        flat = list(itertools.chain.from_iterable(flat))
    if not flat or set(map(type, flat)) != {int} or min(flat) < 0 or max(flat) > 255:
        raise RequestError(f"{name} must be {IMAGE_FORMATS}, got {_preview(value)}.", name)
    try:
        return np.array(value, np.uint8)
    except ValueError as error:
        raise RequestError(f"{name}: rows must have equal lengths: {error}", name) from error


def _contains_encoded_array(value: Any) -> bool:
    if isinstance(value, list):
        return any(isinstance(element, dict) for element in value[:MAX_CAMERAS])
    return isinstance(value, dict)


def _decode_array(value: Any, name: str, allowed: str) -> np.ndarray:
    """Return the array of a json_numpy object; an array that msgpack decoded already is returned as it is."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, dict) or set(value) != {"__numpy__", "dtype", "shape"}:
        raise RequestError(f"{name} must be {allowed}, got {_preview(value)}.", name)
    try:
        data = base64.b64decode(value["__numpy__"], validate=True)
    except (ValueError, TypeError) as error:
        raise RequestError(f"{name}: __numpy__ must be base64: {error}", name) from error
    return _array_from_bytes(data, value["dtype"], value["shape"], name)


def _array_from_bytes(data: bytes, dtype: Any, shape: Any, name: str | None) -> np.ndarray:
    subject = name or "An array"
    if not isinstance(dtype, str) or not re.fullmatch(NUMERIC_DTYPE, dtype):
        raise RequestError(
            f"{subject}: dtype must be of whole or floating numbers such as '|u1' or '<f4', got {_preview(dtype)}.",
            name,
        )
    has_sizes = isinstance(shape, (list, tuple)) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if not has_sizes or len(shape) > MAX_ARRAY_DIMENSIONS or any(n < 0 for n in shape):
        raise RequestError(f"{subject}: shape must be up to four sizes, got {_preview(shape)}.", name)
    if math.prod(shape) * np.dtype(dtype).itemsize != len(data):
        raise RequestError(
            f"{subject}: {len(data)} bytes are no array of shape {list(shape)} and dtype {dtype}.",
            name,
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _dict_without_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return an object's fields; raise RequestError for a duplicate name, of which Python would take the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in fields if names.count(name) > 1)
        raise RequestError(
            f"A field was sent twice: {_preview(duplicate)}; send it once.",
            duplicate if isinstance(duplicate, str) else None,
        )
    return fields


def _decode_msgpack_map(pairs: list[tuple[Any, Any]]) -> Any:
    """Return a map, or the array or number that msgpack_numpy wrote as one."""
    value = _dict_without_duplicates(pairs)
    if b"__npgeneric__" in value and (_is_number(value.get(b"data")) or isinstance(value.get(b"data"), bool)):
        return value[b"data"]
    if b"__ndarray__" not in value:
        return value
    if not isinstance(value.get(b"data"), bytes):
        raise RequestError("An array's data must be bytes.")
    return _array_from_bytes(value[b"data"], value.get(b"dtype"), value.get(b"shape"), None)


def _preview(value: Any) -> str:
    """Return a short form of a value for an error message."""
    if isinstance(value, dict):
        return f"an object with {sorted(map(str, value))[:8]}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
