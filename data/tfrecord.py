"""TFRecord files and the tf.train.Example messages in them, without TensorFlow: numpy only.

A record is its length (uint64), a masked CRC-32C of that, the data, a masked CRC-32C of the data. An Example maps
names to lists of bytes, float32 or int64 (protocol buffers' wire format).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors_openvla import OpenVLAValueError

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, reflected
_MASK_DELTA = 0xA282EAD8
_HEADER, _FOOTER = 12, 4
_MOST_LANES = 1 << 14
_SHORT = 64  # bytes, below which a plain loop is faster


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


@lru_cache(maxsize=1)
def _short_table() -> list[int]:
    return _table().tolist()


def _product(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """A 32 x 32 matrix of bits (its columns as uint32) times each vector."""
    bits = (vectors[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    return np.bitwise_xor.reduce(np.where(bits == 1, matrix, np.uint32(0)), axis=-1)


@lru_cache(maxsize=4096)
def _zeros_operator(length: int) -> np.ndarray:
    """What ``length`` zero bytes do to a CRC register: a 32 x 32 matrix of bits."""
    if length == 0:
        return np.uint32(1) << np.arange(32, dtype=np.uint32)
    if length == 1:
        units = np.uint32(1) << np.arange(32, dtype=np.uint32)
        return _table()[units & 0xFF] ^ (units >> 8)
    half = _zeros_operator(length // 2)
    whole = _product(half, half)
    return _product(_zeros_operator(1), whole) if length % 2 else whole


def crc32c(data: bytes) -> int:
    """CRC-32C. Long data is cut into lanes that advance together; CRCs are linear, so they combine afterwards."""
    table = _table()
    if len(data) < _SHORT:
        value, entries = 0xFFFFFFFF, _short_table()
        for byte in data:
            value = entries[(value ^ byte) & 0xFF] ^ (value >> 8)
        return value ^ 0xFFFFFFFF
    lanes = min(1 << (len(data).bit_length() + 1) // 2, _MOST_LANES)
    values = np.frombuffer(data, np.uint8)
    # Leading zeros do not change a register that starts at zero.
    padded = np.concatenate([np.zeros(-len(values) % lanes, np.uint8), values]).reshape(lanes, -1)
    register = np.zeros(lanes, np.uint32)
    for column in np.ascontiguousarray(padded.T):
        register = table[(register ^ column) & 0xFF] ^ (register >> np.uint32(8))
    length = padded.shape[1]
    while len(register) > 1:
        register = _product(_zeros_operator(length), register[0::2]) ^ register[1::2]
        length *= 2
    start = _product(_zeros_operator(len(data)), np.array([0xFFFFFFFF], np.uint32))
    return int(register[0] ^ start[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The checksum as TFRecord stores it."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def record_offsets(path: Path) -> tuple[list[tuple[int, int]], str | None]:
    """Where the data of every whole record lies, as (offset, length), and what is wrong with the rest, if anything."""
    size, offset, found = path.stat().st_size, 0, []
    with open(path, "rb") as file:
        while offset < size:
            file.seek(offset)
            header = file.read(_HEADER)
            if len(header) < _HEADER:
                return found, f"it is truncated: record {len(found)} begins at byte {offset} of {size}"
            length, checksum = struct.unpack("<QI", header)
            if masked_crc32c(header[:8]) != checksum:
                return found, f"record {len(found)} at byte {offset} has a damaged length, or it is no TFRecord"
            end = offset + _HEADER + length + _FOOTER
            if end > size:
                return found, f"it is truncated: record {len(found)} would end at byte {end}, the file at {size}"
            found.append((offset + _HEADER, length))
            offset = end
    return found, None


def read_record(path: Path, offset: int, length: int) -> bytes:
    """The data of one record, its checksum checked.

    Raises:
        ValueError: The data is damaged.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        data, footer = file.read(length), file.read(_FOOTER)
    if len(footer) < _FOOTER or masked_crc32c(data) != struct.unpack("<I", footer)[0]:
        raise OpenVLAValueError(f"the checksum of the record at byte {offset - _HEADER} is wrong: the file is damaged")
    return data


def parse_example(data: bytes, wanted: Callable[[str], bool]) -> dict[str, list[bytes] | np.ndarray]:
    """The features of a tf.train.Example: lists of bytes, float32 or int64 arrays ``(count,)``.

    Args:
        data: The message.
        wanted: Which names to parse; others are passed over.

    Raises:
        ValueError: It is no such message.
    """
    view, out = memoryview(data), {}
    try:
        for _, features in _fields(view):
            for _, entry in _fields(features):
                parts = dict(_fields(entry))
                name = bytes(parts[1]).decode()
                if wanted(name):
                    out[name] = _values(parts.get(2, b""))
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, ValueError) as error:
        raise OpenVLAValueError(f"the record is no tf.train.Example: {error}") from error
    return out


def _values(feature: memoryview) -> list[bytes] | np.ndarray:
    for kind, content in _fields(feature):
        if kind == 1:
            return [bytes(value) for _, value in _fields(content)]
        if kind == 2:
            return np.concatenate([np.frombuffer(part, "<f4") for _, part in _fields(content)] or [np.zeros(0, "<f4")])
        numbers: list[int] = []
        for _, value in _fields(content):
            numbers.extend([value] if isinstance(value, int) else _varints(value))
        return np.array(numbers, np.uint64).astype(np.int64)
    return []


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(message, position)
        else:
            if wire == 2:
                length, position = _varint(message, position)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise OpenVLAValueError(f"wire type {wire}")
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
