"""Messages of openpi's WebSocket protocol: msgpack, with arrays in msgpack_numpy's encoding (no pickled objects)."""

from __future__ import annotations

import re
from typing import Any

import msgpack
import numpy as np

from ..errors_openvla import OpenVLATypeError, OpenVLAValueError

NUMERIC_DTYPE = r"[<>|=]?([ui][1248]|f[248])"  # no objects, strings, structures or times


def pack_msgpack(fields: dict[str, Any]) -> bytes:
    """Return a message of openpi's WebSocket protocol: msgpack with arrays in msgpack_numpy's encoding."""

    def pack_array(value: Any) -> dict[bytes, Any]:
        if isinstance(value, np.ndarray):
            array = {b"__ndarray__": True, b"data": value.tobytes()}
            return {**array, b"dtype": value.dtype.str, b"shape": value.shape}
        raise OpenVLATypeError(f"Cannot pack {type(value).__name__}.")

    return msgpack.packb(fields, default=pack_array)


def unpack_msgpack(message: bytes) -> Any:
    """Return the content of a message; numbers, arrays of numbers and booleans, text, bytes, lists and maps.

    Raises:
        ValueError: The message is not msgpack, or an array in it is not one of numbers or does not have its size.
    """

    def unpack_array(fields: dict[Any, Any]) -> Any:
        if b"__npgeneric__" in fields:
            return fields.get(b"data")
        if b"__ndarray__" not in fields:
            return fields
        dtype = fields.get(b"dtype")
        if not isinstance(dtype, str) or not re.fullmatch(rf"{NUMERIC_DTYPE}|\|b1", dtype):
            raise ValueError(f"an array of dtype {dtype!r:.60}")
        return np.frombuffer(fields[b"data"], dtype).reshape(fields[b"shape"])

    try:
        return msgpack.unpackb(message, object_hook=unpack_array, strict_map_key=False)
    except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as error:
        raise OpenVLAValueError(f"{len(message)} bytes are no message of openpi's protocol: {error}") from error
