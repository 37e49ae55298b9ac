"""Random input to processor, statistics, readers and the server's parsers: an answer that is finite, or our own error.

A few hundred inputs run with the default tests. ``OPENVLA_FUZZ=100000 python -m pytest tests/test_fuzz.py`` tries as
many, of other seeds each time, and prints the smallest input that fails.
"""

import argparse
import base64
import contextlib
import copy
import io
import json
import linecache
import os
import re
import shutil
import socket
import threading
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
from openvla import OpenVLAProcessor, inspect_data
from openvla.actions_openvla import NormalizationStatistics, validate_norm_stats
from openvla.dataset_statistics import compute_statistics
from openvla.demonstrations import open_demonstrations
from openvla.policy_client import PolicyClient, PolicyServerError
from openvla.robot_conventions import ROBOT_CONVENTIONS, ActionConverter
from openvla.sequence_reader import SequenceReader
from openvla.tfrecord_files import parse_example
from PIL import Image
from reference import REPOSITORY

for package in ("hypothesis", "fastapi", "msgpack", "h5py", "pyarrow"):
    pytest.importorskip(package)

import h5py  # noqa: E402
import msgpack  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from openvla.serve import Limits  # noqa: E402
from openvla.serve_requests import pack_reply, read_json, read_msgpack, reply_of  # noqa: E402

DATA = REPOSITORY / "tests" / "data"
ASKED = int(os.environ.get("OPENVLA_FUZZ", "0"))
TOTAL = ASKED or 400
# What a user's mistake is raised as; DemonstrationError and RequestError are ValueErrors.
ERRORS = (ValueError, KeyError, TypeError, FileNotFoundError, PolicyServerError)


def examples(share: float):
    """Return settings for this share of all inputs: the same ones each time, unless many are asked for."""
    return settings(
        max_examples=max(1, round(TOTAL * share)),
        derandomize=not ASKED,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if ASKED else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def ours(error: BaseException) -> bool:
    """Return whether an error comes from a ``raise`` of this package."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    own = Path(frame.filename).parent == REPOSITORY
    return (
        own
        and isinstance(error, ERRORS)
        and bool(str(error).strip())
        and linecache.getline(frame.filename, frame.lineno).lstrip().startswith("raise")
    )


def answer(function, *arguments, **keywords):
    """Return what a function answers; None where it raises an error of ours. Any other error passes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*arguments, **keywords)
        except Exception as error:
            if ours(error):
                return None
            raise


def test_only_raised_errors_of_the_package_are_ours():
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        validate_norm_stats(3)
    assert ours(raised.value)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        np.zeros(3).reshape(2)
    assert not ours(raised.value)


numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, 1, -1, 255, 1e308, -1e308, 5e-324]))
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20), st.binary(max_size=20))
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
json_junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
DTYPES = ["uint8", "int64", "float32", "float64", "bool", "uint16", "float16", "complex64", "U3", "S3", "O"]


@st.composite
def arrays(draw, dtypes=DTYPES):
    """An array of up to four small dimensions."""
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    shape = draw(
        st.sampled_from(
            [(), (0,), (3,), (7,), (2, 7), (4, 5, 3), (4, 5, 1), (4, 5), (3, 4, 5), (4, 5, 4), (1, 4, 5, 3), (0, 5, 3)]
        )
    )
    if dtype.kind in "OUS":
        return np.full(shape, draw(scalars) if dtype.kind == "O" else "x", dtype)
    values = draw(st.lists(st.floats(width=32) if dtype.kind in "fc" else st.integers(0, 255), min_size=1, max_size=4))
    with np.errstate(all="ignore"):
        return np.resize(np.array(values, np.float64), shape).astype(dtype)


def places(tree, path=()):
    """Yield the path of every value in a tree of dictionaries and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated(draw, tree, values=json_junk):
    """A copy of a tree in which one or two values are others, or gone."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        known = list(places(tree))
        if not known:
            break
        *path, last = draw(st.sampled_from(known))
        holder = tree
        for key in path:
            holder = holder[key]
        if draw(st.booleans()) and isinstance(holder, dict):
            del holder[last]
        else:
            holder[last] = draw(values)
    return tree


# --- statistics -------------------------------------------------------------------------------------------------------

STATISTICS = {
    "robot": {
        "action": {
            **{field: [-0.5] * 7 for field in ("q01", "min", "mean")},
            **{field: [0.5] * 7 for field in ("q99", "max", "std")},
            "mask": [True] * 6 + [False],
        },
        "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
        "num_transitions": 100,
    }
}


@examples(0.25)
@given(
    st.one_of(mutated(STATISTICS, junk), st.dictionaries(st.text(max_size=5), junk, max_size=2)),
    st.sampled_from(["q99", "bounds"]),
)
def test_statistics(norm_stats, normalization):
    def checked():
        validate_norm_stats(norm_stats, normalization)
        return norm_stats

    accepted = answer(checked)
    for key, entry in (accepted or {}).items():
        statistics = NormalizationStatistics(entry["action"], key, normalization, 1e-8, key)
        ends = np.linspace(-1, 1, 5)[:, None].repeat(statistics.dimension, 1)
        actions = statistics.unnormalize(ends)
        assert np.isfinite(actions).all()
        assert np.isfinite(statistics.normalize(actions)).all()
        if isinstance(entry.get("proprio"), dict):
            proprio = answer(NormalizationStatistics, entry["proprio"], key, normalization)
            state = None if proprio is None else answer(proprio.normalize_proprio, np.full(proprio.dimension, -1e308))
            assert state is None or (np.abs(state) <= 1).all()


@examples(0.03)
@given(mutated(STATISTICS), st.booleans())
def test_inspection_of_statistics(tmp_path_factory, norm_stats, as_json):
    file = tmp_path_factory.mktemp("fuzz") / "statistics.json"
    file.write_text(json.dumps(norm_stats))
    parser = argparse.ArgumentParser()
    inspect_data.add_arguments(parser)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        answer(inspect_data.run, parser.parse_args([str(file), *["--json"] * as_json]))
    assert not re.search(r"\b(nan|inf|NaN|Infinity)\b", said.getvalue())
    shutil.rmtree(file.parent)


@examples(0.1)
@given(st.one_of(arrays(), junk), st.sampled_from(sorted(ROBOT_CONVENTIONS)))
def test_conversion_of_actions(action, convention):
    converted = answer(ActionConverter(convention).convert, action)
    assert converted is None or np.isfinite(converted).all()


# --- processor --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(tiny) -> OpenVLAProcessor:
    return tiny.processor


@st.composite
def pictures(draw):
    """A small picture in any of Pillow's modes."""
    mode = draw(
        st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "I;16"])
    )
    return Image.new(mode, draw(st.sampled_from([(1, 1), (7, 5), (224, 224), (1, 300), (0, 3)])))


@examples(0.15)
@given(
    st.one_of(st.text(max_size=60), st.lists(st.text(max_size=9), max_size=3), scalars),
    st.one_of(pictures(), arrays(), st.lists(st.one_of(pictures(), arrays()), max_size=3), scalars),
    st.booleans(),
)
def test_processor(processor, instruction, images, whole):
    said = {"text": instruction} if whole else {"instruction": instruction}
    inputs = answer(processor, images=images, **said)
    if inputs is not None:
        assert np.isfinite(np.asarray(inputs["pixel_values"], np.float64)).all()
        assert len(inputs["input_ids"]) == len(inputs["attention_mask"])


# --- the server's parsers ---------------------------------------------------------------------------------------------


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


REQUEST = {
    "image": picture(),
    "wrist_image": [[[0, 0, 0]] * 2] * 2,
    "instruction": "open the drawer",
    "unnorm_key": "robot",
    "state": {"__numpy__": base64.b64encode(bytes(64)).decode(), "dtype": "<f8", "shape": [8]},
    "details": True,
    "deadline_ms": 100,
    "client_id": "me",
    "latest_only": True,
}
FRAME = {
    "observation/image": np.zeros((2, 2, 3), np.uint8),
    "observation/state": np.zeros(8),
    "prompt": "open the drawer",
}


def require_finite_request(request):
    if request is not None:
        assert request.proprio is None or np.isfinite(request.proprio).all()
        assert request.instruction.strip()
        assert all(image.mode == "RGB" for image in request.images)
        json.dumps(reply_of(request, np.zeros(7)))


@examples(0.2)
@given(st.one_of(mutated(REQUEST), json_junk))
def test_json_requests(fields):
    require_finite_request(answer(read_json, json.dumps(fields).encode(), Limits()))


@examples(0.05)
@given(st.one_of(st.binary(max_size=200), st.tuples(st.integers(0, 400), st.binary(max_size=4))))
def test_bytes_as_json_requests(change):
    body = json.dumps(REQUEST).encode()
    if isinstance(change, tuple):
        body = body[: change[0]] + change[1] + body[change[0] + 1 :]
    else:
        body = change
    require_finite_request(answer(read_json, body, Limits()))


@examples(0.05)
@given(st.integers(0, 2**16), st.binary(max_size=6))
def test_damaged_pictures(place, change):
    data = bytearray(base64.b64decode(REQUEST["image"]))
    place %= len(data)
    data[place : place + len(change)] = change
    body = {"image": base64.b64encode(bytes(data)).decode(), "instruction": "go"}
    require_finite_request(answer(read_json, json.dumps(body).encode(), Limits()))


@examples(0.1)
@given(st.one_of(st.binary(max_size=200), st.tuples(st.integers(0, 300), st.binary(max_size=4)), arrays()))
def test_msgpack_frames(change):
    if isinstance(change, np.ndarray):
        kind = "O" if change.dtype.kind == "O" else ""
        frame = pack_reply({**FRAME, "observation/image": change.tolist() if kind else change})
    elif isinstance(change, tuple):
        frame = pack_reply(FRAME)
        frame = frame[: change[0]] + change[1] + frame[change[0] + 1 :]
    else:
        frame = change
    require_finite_request(answer(read_msgpack, frame, Limits()))


@examples(0.02)
@given(junk)
def test_msgpack_of_any_value(value):
    try:
        frame = msgpack.packb(value)
    except (OverflowError, ValueError, TypeError):  # msgpack writes no such number or text
        return
    require_finite_request(answer(read_msgpack, frame, Limits()))


# --- readers ----------------------------------------------------------------------------------------------------------


def read_all(reader):
    """Read every episode as training does; its numbers must be finite."""
    compute_statistics(reader, progress=False)
    for index in range(len(reader)):
        episode = reader[index]
        step = episode.step(len(episode) - 1)
        assert np.isfinite(step.action).all()
        assert step.proprio is None or np.isfinite(step.proprio).all()
        assert step.instruction.strip()
        assert all(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 for image in step.images)
    return True


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))


ROW = {
    "observation": {"image": np.zeros((4, 5, 3), np.uint8), "state": np.linspace(-1, 1, 8)},
    "action": np.linspace(-0.5, 0.5, 7),
    "task": "open the drawer",
    "episode_index": 0,
    "frame_index": 0,
}
FIELDS = {"cameras": ["observation.image"], "action": "action", "proprio": "observation.state", "instruction": "task"}


@st.composite
def rows(draw):
    steps = [{**copy.deepcopy(ROW), "episode_index": step // 3, "frame_index": step % 3} for step in range(6)]
    for _ in range(draw(st.integers(0, 2))):
        step = draw(st.integers(0, 5))
        steps[step] = draw(mutated(steps[step], st.one_of(arrays(), junk)))
    return steps


@examples(0.05)
@given(rows())
def test_sequences_of_steps(own_cache, steps):
    answer(lambda: read_all(SequenceReader(steps, "mine", FIELDS)))


@examples(0.01)
@given(mutated(json.loads((DATA / "lerobot_v3" / "meta" / "info.json").read_text())))
def test_lerobot_info(own_cache, tmp_path_factory, info):
    folder = tmp_path_factory.mktemp("fuzz") / "data"
    shutil.copytree(DATA / "lerobot_v3", folder)
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    answer(lambda: read_all(open_demonstrations(folder)))
    shutil.rmtree(folder.parent)


@examples(0.01)
@given(
    st.dictionaries(
        st.sampled_from(["actions", "obs/agentview_rgb", "obs/ee_pos", "dones", "x"]), arrays(), min_size=1
    ),
    st.one_of(st.none(), st.text(max_size=9), st.binary(max_size=9), numbers),
)
def test_hdf5_files(own_cache, tmp_path_factory, columns, instruction):
    folder = tmp_path_factory.mktemp("fuzz")
    with h5py.File(folder / "demo.hdf5", "w") as file:
        group = file.create_group("data/demo_0")
        try:
            for name, values in columns.items():
                group[name] = values
            if instruction is not None:
                group.attrs["language_instruction"] = instruction
        except (TypeError, ValueError, OSError, OverflowError):  # h5py stores no such value
            return
    fields = {"cameras": ["obs.agentview_rgb"], "action": "actions", "rotate_180": False}
    answer(lambda: read_all(open_demonstrations(folder, fields=fields)))
    answer(lambda: read_all(open_demonstrations(folder)))
    shutil.rmtree(folder)


def record() -> bytes:
    from openvla.tfrecord_files import read_record, record_offsets

    file = next((DATA / "bridge_orig").rglob("*.tfrecord*"))
    return read_record(file, *record_offsets(file)[0][0])


RECORD = record()


@examples(0.02)
@given(
    st.lists(st.tuples(st.integers(0, len(RECORD) - 1), st.integers(0, 255)), min_size=1, max_size=3), st.integers(0, 3)
)
def test_tfrecords(changes, cut):
    data = bytearray(RECORD)
    for place, value in changes:
        data[place] = value
    data = bytes(data[: len(data) - cut])
    answer(parse_example, data, lambda name: True)


@examples(0.01)
@given(mutated(json.loads(next((DATA / "bridge_orig").rglob("features.json")).read_text())))
def test_rlds_features(own_cache, tmp_path_factory, features):
    folder = tmp_path_factory.mktemp("fuzz") / "bridge_orig"
    shutil.copytree(DATA / "bridge_orig", folder)
    next(folder.rglob("features.json")).write_text(json.dumps(features))
    answer(lambda: read_all(open_demonstrations(folder)))
    shutil.rmtree(folder.parent)
