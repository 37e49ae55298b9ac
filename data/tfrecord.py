"""Read TFRecord files and the tf.train.Example messages in them without TensorFlow.

A record consists of its length (uint64), a masked CRC-32C of the length, the data and a masked CRC-32C of the data. An
Example maps names to lists of bytes, float32 or int64 (protocol buffers' wire format).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors_openvla import OpenVLAValueError
from .utils import require

_MASK_DELTA = 0xA282EAD8
_HEADER, _FOOTER = 12, 4
# Wire types of protocol buffers.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Kinds of a tf.train.Feature: the field numbers of bytes_list and float_list; the third is int64_list.
_BYTES_LIST, _FLOAT_LIST = 1, 2


def masked_crc32c(data: bytes) -> int:
    """Return the masked CRC-32C that TFRecord stores.

    Raises:
        ImportError: The library google-crc32c is not installed.
    """
    crc = require("google_crc32c", "Reading RLDS datasets").value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


class RecordLocation(NamedTuple):
    """Offset and length in bytes of a record's data."""

    offset: int
    length: int


class RecordIndex(NamedTuple):
    """The intact records of a file, and the damage that follows them, if any."""

    records: list[RecordLocation]
    damage: str | None


def index_records(path: Path) -> RecordIndex:
    """Return the locations of all records up to the first damaged one; the data's checksums are not read."""
    size, offset = path.stat().st_size, 0
    records: list[RecordLocation] = []
    with open(path, "rb") as file:
        while offset < size:
            file.seek(offset)
            header = file.read(_HEADER)
            if len(header) < _HEADER:
                return RecordIndex(records, f"it is truncated: record {len(records)} begins at byte {offset} of {size}")
            length, checksum = struct.unpack("<QI", header)
            if masked_crc32c(header[:8]) != checksum:
                return RecordIndex(
                    records,
                    f"record {len(records)} at byte {offset} has a damaged length, or it is not a TFRecord file",
                )
            end = offset + _HEADER + length + _FOOTER
            if end > size:
                return RecordIndex(
                    records, f"it is truncated: record {len(records)} would end at byte {end}, the file at {size}"
                )
            records.append(RecordLocation(offset + _HEADER, length))
            offset = end
    return RecordIndex(records, None)


def read_record(path: Path, location: RecordLocation) -> bytes:
    """Return the data of one record after verifying its checksum.

    Raises:
        ValueError: The data is damaged.
    """
    with open(path, "rb") as file:
        file.seek(location.offset)
        data, footer = file.read(location.length), file.read(_FOOTER)
    if len(footer) < _FOOTER or masked_crc32c(data) != struct.unpack("<I", footer)[0]:
        raise OpenVLAValueError(
            f"the checksum of the record at byte {location.offset - _HEADER} is wrong: the file is damaged"
        )
    return data


def parse_example(data: bytes, select: Callable[[str], bool]) -> dict[str, list[bytes] | np.ndarray]:
    """Return the features of a tf.train.Example: lists of bytes, or float32 or int64 arrays ``(count,)``.

    Args:
        data: The serialized message.
        select: Return whether to parse the feature of a name.

    Raises:
        ValueError: The data is not such a message.
    """
    features: dict[str, list[bytes] | np.ndarray] = {}
    try:
        for _, message in _messages(memoryview(data)):
            for _, entry in _messages(message):
                key_and_value = dict(_messages(entry))
                name = bytes(key_and_value[1]).decode()
                if select(name):
                    features[name] = _parse_feature(key_and_value.get(2, memoryview(b"")))
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
        raise OpenVLAValueError(f"the record is not a tf.train.Example: {error}") from error
    return features


def _parse_feature(feature: memoryview) -> list[bytes] | np.ndarray:
    for kind, content in _messages(feature):
        if kind == _BYTES_LIST:
            return [bytes(value) for _, value in _messages(content)]
        if kind == _FLOAT_LIST:
            parts = [np.frombuffer(part, "<f4") for _, part in _messages(content)]
            return np.concatenate(parts or [np.zeros(0, "<f4")])
        numbers: list[int] = []
        for _, value in _fields(content):
            numbers.extend([value] if isinstance(value, int) else _varints(value))
        return np.array(numbers, np.uint64).astype(np.int64)
    return []


def _messages(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of every field of a message whose fields hold bytes."""
    for number, value in _fields(message):
        if isinstance(value, int):
            raise OpenVLAValueError(f"field {number} must hold bytes, got the number {value}")
        yield number, value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of every field of a message."""
    position, end = 0, len(message)
    value: int | memoryview
    while position < end:
        key, position = _varint(message, position)
        wire_type = key & 7
        if wire_type == _VARINT:
            value, position = _varint(message, position)
        else:
            if wire_type == _BYTES:
                length, position = _varint(message, position)
            elif wire_type in (_FIXED64, _FIXED32):
                length = 8 if wire_type == _FIXED64 else 4
            else:
                raise OpenVLAValueError(f"wire type {wire_type}")
            value = message[position : position + length]
            position += length
            if position > end:
                raise OpenVLAValueError("a field ends beyond its message")
        yield key >> 3, value


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7


def _varints(packed: memoryview) -> list[int]:
    small = np.frombuffer(packed, np.uint8)
    if (small < 128).all():
        return small.tolist()
    values, position = [], 0
    while position < len(packed):
        value, position = _varint(packed, position)
        values.append(value)
    return values
