"""What a policy server is asked and answers, in the formats that robots send: json_numpy, plain JSON, msgpack.

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
from typing import Any

import msgpack
import numpy as np
from PIL import Image

from ..actions_openvla import nearest_name
from ..errors_openvla import OpenVLATypeError, OpenVLAValueError
from ..images_openvla import as_images, require_eight_bits, require_one_frame, upright_rgb
from .cli import Limits

# The fields of the clients of OpenVLA's server, of OpenVLA-OFT's (every field with "wrist" in it is a camera, in the
# order sent) and of openpi's, whose fields are these with a prefix.
IMAGE_FIELDS = ("image", "full_image")
WRIST = "wrist"
PROPRIO_FIELDS = ("state", "proprio")
INSTRUCTION_FIELDS = ("instruction", "prompt")
OPENPI_PREFIX = "observation/"
OTHER_FIELDS = ("unnorm_key", "details", "client_id", "latest_only", "deadline_ms", "constrain_actions")

# Plain numbers: no objects, strings, structures or times.
NUMBERS = re.compile(r"[<>|=]?([ui][1248]|f[248])")
PICTURE_FORMATS = ("PNG", "JPEG")
MAX_ASPECT = 16  # where a processor pads to the square or fits the shorter side, a strip would become huge


class RequestError(OpenVLAValueError):
    """A request that is refused.

    Args:
        message: What was got, what is allowed.
        field: The field at fault, as the client named it.
        status: Of HTTP.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 422) -> None:
        super().__init__(message)
        self.field, self.status = field, status


@dataclass
class ActRequest:
    """One request, checked as far as it can be without the model.

    Attributes:
        images: RGB, the main camera first.
        instruction: What the robot should do.
        unnorm_key: As of ``predict_action``.
        proprio: float64 ``(proprio_dim,)`` in the robot's units.
        details: Whether more than the action is wanted.
        client_id: Whose frame it is.
        latest_only: Whether it is to be dropped for a newer frame of the same client.
        deadline: Seconds, or None for the server's.
        encoding: Of the reply: "plain", "json_numpy" or "double" (json_numpy in a JSON string).
        as_list: Whether the reply is a list of actions even where it is one, as OpenVLA-OFT's.
        constrain_actions: As of ``predict_action``, or None for the server's.
        names: Fields as the client named them: of "image", "proprio", "instruction".
    """

    images: list[Image.Image]
    instruction: str
    unnorm_key: str | None = None
    proprio: np.ndarray | None = None
    details: bool = False
    client_id: str | None = None
    latest_only: bool = False
    deadline: float | None = None
    encoding: str = "plain"
    as_list: bool = False
    constrain_actions: bool | None = None
    names: dict[str, str] = field(default_factory=dict)


def read_json(body: bytes, limits: Limits) -> ActRequest:
    """A request of ``POST /act``: json_numpy, json_numpy in ``{"encoded": "..."}``, or plain JSON.

    Raises:
        RequestError: It is malformed; the message names the field.
    """
    fields = _json_object(body, None)
    double = "encoded" in fields
    if double:
        if set(fields) != {"encoded"} or not isinstance(fields["encoded"], str):
            raise RequestError("encoded must be a string, and the only field.", "encoded")
        fields = _json_object(fields["encoded"], "encoded")
    is_encoded = any(_holds_array(value) for value in fields.values())
    request = _read_fields(fields, limits)
    request.encoding = "double" if double else "json_numpy" if is_encoded else "plain"
    return request


def read_msgpack(frame: bytes, limits: Limits) -> ActRequest:
    """A frame of openpi's websocket protocol.

    Raises:
        RequestError: It is malformed; the message names the field.
    """
    try:
        fields = msgpack.unpackb(frame, object_pairs_hook=_msgpack_map, max_ext_len=0)
    except RequestError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise RequestError(f"The frame must be msgpack, got {len(frame)} bytes that are not: {error}", None, 400) from (
            error
        )
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise RequestError(f"The frame must be a map with text keys, got {type(fields).__name__}.", None, 400)
    return _read_fields(fields, limits)


def reply_of(request: ActRequest, actions: np.ndarray) -> Any:
    """Actions ``(action_dim,)`` or ``(chunk, action_dim)`` as the client of this request reads them, ready for JSON."""
    if request.as_list:
        actions = list(np.atleast_2d(actions))
    if request.encoding == "plain":
        return [row.tolist() for row in actions] if request.as_list else actions.tolist()
    encoded = [encode_array(row) for row in actions] if request.as_list else encode_array(actions)
    return json.dumps(encoded) if request.encoding == "double" else encoded


def encode_array(array: np.ndarray) -> dict[str, Any]:
    """An array as json_numpy writes it."""
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def pack_reply(fields: dict[str, Any]) -> bytes:
    """A message of openpi's websocket protocol."""

    def packed(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            array = {b"__ndarray__": True, b"data": value.tobytes()}
            return {**array, b"dtype": value.dtype.str, b"shape": value.shape}
        raise OpenVLATypeError(f"Cannot pack {type(value).__name__}.")

    return msgpack.packb(fields, default=packed)


def _json_object(text: bytes | str, name: str | None) -> dict[str, Any]:
    what = name or "The body"

    def refuse(constant: str) -> None:
        raise RequestError(f"{what} holds {constant}, which JSON does not know; numbers must be finite.", name, 400)

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        fields = json.loads(text, parse_constant=refuse, object_pairs_hook=_once_each)
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{what} must be JSON, got {len(text)} bytes that are not: {error}", name, 400) from error
    if not isinstance(fields, dict):
        raise RequestError(f"{what} must be a JSON object, got {type(fields).__name__}.", name)
    return fields


def _read_fields(fields: dict[str, Any], limits: Limits) -> ActRequest:
    """The fields of any format, under the name that every client has for them."""
    sent = {name.removeprefix(OPENPI_PREFIX): name for name in fields}
    if len(sent) < len(fields):
        raise RequestError(f"A field was sent twice, with and without {OPENPI_PREFIX!r}: {sorted(fields)}.")
    wrists = [name for name in sent if WRIST in name]
    known = (*IMAGE_FIELDS, *PROPRIO_FIELDS, *INSTRUCTION_FIELDS, *OTHER_FIELDS)
    for name, as_sent in sent.items():
        if name not in known and name not in wrists:
            near = nearest_name(name, known)
            hint = f" Did you mean {near!r}?" if near else ""
            raise RequestError(f"Unknown field {_shown(as_sent)}.{hint} Known: {[*known, 'wrist_image']}.", as_sent)
    main = _only_one(sent, IMAGE_FIELDS, "image")
    said = _only_one(sent, INSTRUCTION_FIELDS, "instruction")
    state = _only_one(sent, PROPRIO_FIELDS)
    request = ActRequest(
        images=_images(fields[main], main, limits),
        instruction=_instruction(fields[said], said, limits),
        proprio=None if state is None or fields[state] is None else _state(fields[state], state),
        unnorm_key=_text(fields, "unnorm_key"),
        details=_flag(fields, "details"),
        constrain_actions=None if fields.get("constrain_actions") is None else _flag(fields, "constrain_actions"),
        client_id=_text(fields, "client_id"),
        latest_only=_flag(fields, "latest_only"),
        deadline=_deadline(fields.get("deadline_ms")),
        as_list="full_image" in sent or any(name.startswith(OPENPI_PREFIX) for name in fields),
        names={"image": main, "proprio": state or PROPRIO_FIELDS[0], "instruction": said},
    )
    for name in wrists:
        request.images += _images(fields[sent[name]], sent[name], limits)
    if request.latest_only and request.client_id is None:
        raise RequestError("latest_only needs client_id: whose older frames are to be dropped?", "client_id")
    return request


def _only_one(sent: dict[str, str], names: tuple[str, ...], required: str | None = None) -> str | None:
    found = [sent[name] for name in names if name in sent]
    if len(found) > 1:
        raise RequestError(f"{' and '.join(found)} mean the same; send one of them.", found[1])
    if required and not found:
        raise RequestError(f"{required} is missing (or {' or '.join(names[1:])}).", required)
    return found[0] if found else None


def _instruction(value: Any, name: str, limits: Limits) -> str:
    if isinstance(value, bytes):
        raise RequestError(f"{name} must be text, got bytes; send a string (UTF-8).", name)
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{name} must be text that says what to do, got {_shown(value)}.", name)
    if len(value) > limits.instruction_characters:
        raise RequestError(
            f"{name} has {len(value)} characters; at most {limits.instruction_characters} are allowed.", name
        )
    return _unicode(value, name)


def _text(fields: dict[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is not None and (not isinstance(value, str) or not 0 < len(value) <= 200):
        raise RequestError(f"{name} must be text of 1 to 200 characters, or left out, got {_shown(value)}.", name)
    return None if value is None else _unicode(value, name)


def _unicode(value: str, name: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} holds half of a surrogate pair, which is no character: {error}", name) from error
    return value


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, got {_shown(value)}.", name)
    return value


def _deadline(value: Any) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or not 0 < value < 1e9:
        raise RequestError(f"deadline_ms must be a number of milliseconds above 0, got {_shown(value)}.", "deadline_ms")
    return value / 1000


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _state(value: Any, name: str) -> np.ndarray:
    """float64 ``(n,)``, finite."""
    if isinstance(value, list) and all(map(_is_number, value)):
        try:
            value = np.array(value, np.float64)
        except OverflowError as error:
            raise RequestError(f"{name} holds a number beyond float64: {error}", name) from error
    value = _as_array(value, name, "a list of numbers, or an encoded array")
    if value.ndim != 1 or value.size == 0:
        raise RequestError(f"{name} must be flat, (n,), got shape {value.shape}.", name)
    if not np.isfinite(value).all():
        raise RequestError(f"{name} must be finite, got {value.tolist()[:32]}.", name)
    return value.astype(np.float64)


def _images(value: Any, name: str, limits: Limits) -> list[Image.Image]:
    """The image of a field, or the images of several cameras."""
    if isinstance(value, np.ndarray) and value.ndim == 4:
        value = list(value)
    first, depth = value, 0
    while isinstance(first, list) and first and depth < 4:
        first, depth = first[0], depth + 1
    cameras = value if depth == 4 or depth == 1 and not _is_number(first) else [value]
    if len(cameras) > 16:
        raise RequestError(f"{name} holds {len(cameras)} images; no model here takes more than 16.", name)
    return [_image(camera, name, limits) for camera in cameras]


def _image(value: Any, name: str, limits: Limits) -> Image.Image:
    if isinstance(value, str):
        return _picture(value, name, limits)
    array = _pixels(value, name) if isinstance(value, list) else _as_array(value, name, _IMAGE_FORMS)
    if array.ndim not in (2, 3):
        raise RequestError(f"{name} must have shape (height, width, 3), got {array.shape}.", name)
    _require_size(array.shape[1], array.shape[0], name, limits)
    try:
        return as_images(array)[0]
    except (ValueError, TypeError) as error:
        raise RequestError(f"{name}: {error}", name) from error


_IMAGE_FORMS = (
    "base64 of a PNG or JPEG (with or without data:image/png;base64,), rows of pixels of whole numbers 0 to 255, or an "
    "array encoded by json_numpy; paths and URLs are never opened"
)


def _picture(text: str, name: str, limits: Limits) -> Image.Image:
    """A PNG or JPEG from base64; its size is checked before it is decoded."""
    head, comma, rest = text.partition(",") if text.startswith("data:") else ("", "", text)
    if text.startswith("data:") and not (comma and head.endswith(";base64")):
        raise RequestError(f"{name}: a data URL must be data:image/png;base64,..., got {_shown(head)}.", name)
    try:
        data = base64.b64decode("".join(rest.split()), validate=True)
        image = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
        _require_size(*image.size, name, limits)
        try:
            require_one_frame(require_eight_bits(image))
        except ValueError as error:
            raise RequestError(f"{name}: {error}", name) from error
        return upright_rgb(image)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise RequestError(f"{name} is too large: {error}", name, 413) from error
    except (ValueError, OSError, SyntaxError, binascii.Error) as error:  # what Pillow raises for broken files
        raise RequestError(f"{name} must be {_IMAGE_FORMS}; got {_shown(text)}: {error}", name) from error


def _require_size(width: int, height: int, name: str, limits: Limits) -> None:
    short, long = sorted((width, height))
    if short < 1:
        raise RequestError(f"{name} has no pixels: {width} x {height}.", name)
    if long > limits.image_side:
        raise RequestError(
            f"{name} has {width} x {height} pixels; at most {limits.image_side} a side are allowed.", name, 413
        )
    if long > MAX_ASPECT * short:
        raise RequestError(f"{name} is a strip of {width} x {height} pixels; at most {MAX_ASPECT} : 1.", name)


def _pixels(value: list[Any], name: str) -> np.ndarray:
    """uint8 of nested lists of whole numbers.

    Numbers with a point are refused: JavaScript writes 1.0 as 1, so that they could be either of two scales.
    """
    flat: Any = value
    while isinstance(flat, list) and flat and isinstance(flat[0], list):
        if not all(isinstance(row, list) for row in flat):
            raise RequestError(f"{name}: rows must have equal lengths.", name)
        flat = list(itertools.chain.from_iterable(flat))
    if not flat or set(map(type, flat)) != {int} or min(flat) < 0 or max(flat) > 255:
        raise RequestError(f"{name} must be {_IMAGE_FORMS}, got {_shown(value)}.", name)
    try:
        return np.array(value, np.uint8)
    except ValueError as error:
        raise RequestError(f"{name}: rows must have equal lengths: {error}", name) from error


def _holds_array(value: Any) -> bool:
    if isinstance(value, list):
        return any(isinstance(entry, dict) for entry in value[:16])
    return isinstance(value, dict)


def _as_array(value: Any, name: str, allowed: str) -> np.ndarray:
    """The array of a json_numpy object, or one that msgpack held."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, dict) or set(value) != {"__numpy__", "dtype", "shape"}:
        raise RequestError(f"{name} must be {allowed}, got {_shown(value)}.", name)
    try:
        data = base64.b64decode(value["__numpy__"], validate=True)
    except (ValueError, TypeError) as error:
        raise RequestError(f"{name}: __numpy__ must be base64: {error}", name) from error
    return _array_of(data, value["dtype"], value["shape"], name)


def _array_of(data: bytes, dtype: Any, shape: Any, name: str | None) -> np.ndarray:
    if not isinstance(dtype, str) or not NUMBERS.fullmatch(dtype):
        raise RequestError(
            f"{name or 'An array'}: dtype must be of whole or floating numbers such as '|u1' or '<f4', got "
            f"{_shown(dtype)}.",
            name,
        )
    whole = isinstance(shape, (list, tuple)) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if not whole or len(shape) > 4 or any(n < 0 for n in shape):
        raise RequestError(f"{name or 'An array'}: shape must be up to four sizes, got {_shown(shape)}.", name)
    if math.prod(shape) * np.dtype(dtype).itemsize != len(data):
        raise RequestError(
            f"{name or 'An array'}: {len(data)} bytes are no array of shape {list(shape)} and dtype {dtype}.",
            name,
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _once_each(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return an object's fields; RequestError where a name stands twice, of which Python would take the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise RequestError(
            f"A field was sent twice: {_shown(twice)}; send it once.", twice if isinstance(twice, str) else None
        )
    return fields


def _msgpack_map(pairs: list[tuple[Any, Any]]) -> Any:
    """Return a map, or the array or number that openpi writes as one."""
    value = _once_each(pairs)
    if b"__npgeneric__" in value and (_is_number(value.get(b"data")) or isinstance(value.get(b"data"), bool)):
        return value[b"data"]
    if b"__ndarray__" not in value:
        return value
    if not isinstance(value.get(b"data"), bytes):
        raise RequestError("An array's data must be bytes.")
    return _array_of(value[b"data"], value.get(b"dtype"), value.get(b"shape"), None)


def _shown(value: Any) -> str:
    """A value in an error message: its beginning."""
    if isinstance(value, dict):
        return f"an object with {sorted(map(str, value))[:8]}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
