"""Write small RLDS datasets without TensorFlow."""

import json
import struct

import numpy as np
import pytest
from encoded_images import jpeg
from openvla.data.tfrecord import masked_crc32c

pytest.importorskip("google_crc32c")


def write_rlds(root, name, episodes):
    """Write a dataset of one shard and return its folder.

    Args:
        root: The parent folder.
        name: The dataset's name.
        episodes: Columns of every episode by their path in a step (``observation/state``): arrays ``(length, ...)`` of
            floats, integers or booleans, lists of encoded images (a path with "image"), or lists of texts.
    """
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    tree = {}
    for path, values in episodes[0].items():
        *groups, leaf = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {"featuresDict": {"features": {}}})["featuresDict"]["features"]
        node[leaf] = _feature(path, values)
    steps = {"sequence": {"feature": {"featuresDict": {"features": tree}}}}
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": {"steps": steps}}}))
    info = {"name": name, "splits": [{"name": "train", "shardLengths": [str(len(episodes))]}]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    records = b"".join(_record(_example(episode)) for episode in episodes)
    (folder / f"{name}-train.tfrecord-00000-of-00001").write_bytes(records)
    return folder


def _feature(path, values):
    if isinstance(values, list):
        if "image" not in path:
            return {"text": {}}
        return {"image": {"shape": {"dimensions": ["8", "8", "3"]}, "dtype": "uint8", "encodingFormat": "jpeg"}}
    shape, dtype = [str(size) for size in values.shape[1:]], str(values.dtype)
    return {"tensor": {"shape": {"dimensions": shape}, "dtype": dtype, "encoding": "none"}}


def _example(episode):
    body = b""
    for path, values in episode.items():
        if isinstance(values, list):
            texts = [value if isinstance(value, bytes) else value.encode() for value in values]
            kind = _field(1, b"".join(_field(1, text) for text in texts))
        elif values.dtype.kind == "f":
            kind = _field(2, _field(1, values.astype("<f4").tobytes()))
        else:
            kind = _field(3, _field(1, b"".join(_varint(int(value)) for value in values.reshape(-1))))
        body += _field(1, _field(1, f"steps/{path}".encode()) + _field(2, kind))
    return _field(1, body)


def _record(data):
    head = struct.pack("<Q", len(data))
    return b"".join((head, struct.pack("<I", masked_crc32c(head)), data, struct.pack("<I", masked_crc32c(data))))


def _varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _field(number, data):
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def episode_columns(length=6, **changes):
    """Return the columns of an episode; ``action`` counts steps in its first dimension, the gripper opens half-way."""
    action = np.zeros((length, 7), np.float32)
    action[:, 0] = np.arange(length) / 10
    action[:, 6] = np.arange(length) >= length // 2
    columns = {
        "action": action,
        "observation/image": [jpeg(20 * step) for step in range(length)],
        "observation/state": np.zeros((length, 8), np.float32),
        "language_instruction": ["pick up the cup"] * length,
    }
    return {**columns, **changes}
