"""Random input to processor, statistics, readers and the server's parsers: the result is finite, or an OpenVLAError.

A few hundred inputs run with the default tests. ``OPENVLA_FUZZ=100000 python -m pytest tests/test_fuzz.py`` tries as
many, with new seeds in every run, and prints the smallest input that fails.
"""

import argparse
import base64
import contextlib
import copy
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import rlds
from openvla import OpenVLAProcessor
from openvla.actions_openvla import NormalizationStatistics, validate_norm_stats
from openvla.data import inspect as inspect_data
from openvla.data.open import open_dataset
from openvla.data.statistics import compute_statistics
from openvla.data.tfrecord import parse_example
from openvla.data.torch_dataset import TorchDatasetReader
from openvla.inference.robot_conventions import ROBOT_CONVENTIONS, ActionConverter
from openvla.serving.client import PolicyClient
from PIL import Image
from reference import FIXTURES

for package in ("hypothesis", "fastapi", "msgpack", "h5py", "pyarrow"):
    pytest.importorskip(package)

import h5py  # noqa: E402
import msgpack  # noqa: E402
import pyarrow  # noqa: E402
from fuzzing import (  # noqa: E402
    arrays,
    examples,
    is_user_error,
    json_junk,
    junk,
    mutated,
    numbers,
    raw_server,
    result_or_none,
    scalars,
)
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from openvla.inference.openpi_messages import pack_msgpack  # noqa: E402
from openvla.serving.cli import Limits  # noqa: E402
from openvla.serving.requests import encode_reply, parse_json_request, parse_msgpack_request  # noqa: E402
from pyarrow import parquet  # noqa: E402


def test_only_errors_that_the_package_raises_are_user_errors():
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        validate_norm_stats(3)
    assert is_user_error(raised.value)
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        np.zeros(3).reshape(2)
    assert not is_user_error(raised.value)


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


@examples(0.2)
@given(
    st.one_of(mutated(STATISTICS, junk), st.dictionaries(st.text(max_size=5), junk, max_size=2)),
    st.sampled_from(["q99", "bounds"]),
)
def test_statistics(norm_stats, normalization):
    def checked():
        validate_norm_stats(norm_stats, normalization)
        return norm_stats

    accepted = result_or_none(checked)
    for key, entry in (accepted or {}).items():
        statistics = NormalizationStatistics(entry["action"], key, normalization, 1e-8, key)
        ends = np.linspace(-1, 1, 5)[:, None].repeat(statistics.dimension, 1)
        actions = statistics.unnormalize(ends)
        assert np.isfinite(actions).all()
        assert np.isfinite(statistics.normalize(actions)).all()
        if isinstance(entry.get("proprio"), dict):
            proprio = result_or_none(NormalizationStatistics, entry["proprio"], key, normalization)
            state = (
                None
                if proprio is None
                else result_or_none(proprio.normalize_proprio, np.full(proprio.dimension, -1e308))
            )
            assert state is None or (np.abs(state) <= 1).all()


@examples(0.03)
@given(mutated(STATISTICS), st.booleans())
def test_inspection_of_statistics(tmp_path_factory, norm_stats, as_json):
    file = tmp_path_factory.mktemp("fuzz") / "statistics.json"
    file.write_text(json.dumps(norm_stats))
    parser = argparse.ArgumentParser()
    inspect_data.add_arguments(parser)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result_or_none(inspect_data.run, parser.parse_args([str(file), *["--json"] * as_json]))
    assert not re.search(r"\b(nan|inf|NaN|Infinity)\b", printed.getvalue())
    shutil.rmtree(file.parent)


@examples(0.1)
@given(st.one_of(arrays(), junk), st.sampled_from(sorted(ROBOT_CONVENTIONS)))
def test_conversion_of_actions(action, convention):
    converted = result_or_none(ActionConverter(convention).convert, action)
    assert converted is None or np.isfinite(converted).all()


# --- processor --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(tiny) -> OpenVLAProcessor:
    return tiny.processor


@st.composite
def images(draw):
    """Draw a small image in one of Pillow's modes."""
    mode = draw(
        st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "I;16"])
    )
    return Image.new(mode, draw(st.sampled_from([(1, 1), (7, 5), (224, 224), (1, 300), (0, 3)])))


@examples(0.15)
@given(
    st.one_of(st.text(st.characters(), max_size=60), st.lists(st.text(max_size=9), max_size=3), scalars, junk),
    st.one_of(images(), arrays(), st.lists(st.one_of(images(), arrays()), max_size=3), scalars),
    st.booleans(),
)
def test_processor(processor, instruction, images, is_prompt):
    text = {"text": instruction} if is_prompt else {"instruction": instruction}
    inputs = result_or_none(processor, images=images, **text)
    if inputs is not None:
        assert images is None or np.isfinite(np.asarray(inputs["pixel_values"], np.float64)).all()
        assert len(inputs["input_ids"]) == len(inputs["attention_mask"])


# --- the server's parsers ---------------------------------------------------------------------------------------------


def png_base64() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


REQUEST = {
    "image": png_base64(),
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
        json.dumps(encode_reply(request, np.zeros(7)))


@examples(0.2)
@given(st.one_of(mutated(REQUEST), json_junk))
def test_json_requests(fields):
    require_finite_request(result_or_none(parse_json_request, json.dumps(fields).encode(), Limits()))


@examples(0.05)
@given(st.one_of(st.binary(max_size=200), st.tuples(st.integers(0, 400), st.binary(max_size=4))))
def test_bytes_as_json_requests(change):
    body = json.dumps(REQUEST).encode()
    if isinstance(change, tuple):
        body = body[: change[0]] + change[1] + body[change[0] + 1 :]
    else:
        body = change
    require_finite_request(result_or_none(parse_json_request, body, Limits()))


@examples(0.05)
@given(st.integers(0, 2**16), st.binary(max_size=6))
def test_damaged_images(offset, change):
    data = bytearray(base64.b64decode(REQUEST["image"]))
    offset %= len(data)
    data[offset : offset + len(change)] = change
    body = {"image": base64.b64encode(bytes(data)).decode(), "instruction": "go"}
    require_finite_request(result_or_none(parse_json_request, json.dumps(body).encode(), Limits()))


@examples(0.1)
@given(st.one_of(st.binary(max_size=200), st.tuples(st.integers(0, 300), st.binary(max_size=4)), arrays()))
def test_msgpack_frames(change):
    if isinstance(change, np.ndarray):
        kind = "O" if change.dtype.kind == "O" else ""
        try:
            frame = pack_msgpack({**FRAME, "observation/image": change.tolist() if kind else change})
        except (OverflowError, ValueError, TypeError):  # msgpack writes no whole number of more than 64 bits
            return
    elif isinstance(change, tuple):
        frame = pack_msgpack(FRAME)
        frame = frame[: change[0]] + change[1] + frame[change[0] + 1 :]
    else:
        frame = change
    require_finite_request(result_or_none(parse_msgpack_request, frame, Limits()))


@examples(0.02)
@given(junk)
def test_msgpack_of_any_value(value):
    try:
        frame = msgpack.packb(value)
    except (OverflowError, ValueError, TypeError):  # msgpack writes no such number or text
        return
    require_finite_request(result_or_none(parse_msgpack_request, frame, Limits()))


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
def step_lists(draw):
    steps = [{**copy.deepcopy(ROW), "episode_index": step // 3, "frame_index": step % 3} for step in range(6)]
    for _ in range(draw(st.integers(0, 2))):
        step = draw(st.integers(0, 5))
        steps[step] = draw(mutated(steps[step], st.one_of(arrays(), junk)))
    return steps


@examples(0.03)
@given(step_lists())
def test_sequences_of_steps(own_cache, steps):
    result_or_none(lambda: read_all(TorchDatasetReader(steps, "mine", FIELDS)))


EPISODES = [[{**ROW, "episode_index": episode, "frame_index": step} for step in range(2)] for episode in range(2)]


@examples(0.02)
@given(mutated(EPISODES, st.one_of(arrays(), junk)), st.one_of(st.none(), st.lists(st.integers(-2, 5) | scalars)))
def test_sequences_of_episodes(own_cache, episodes, lengths):
    result_or_none(lambda: read_all(TorchDatasetReader(episodes, "mine", FIELDS)))
    steps = [step for episode in EPISODES for step in episode]
    result_or_none(lambda: read_all(TorchDatasetReader(steps, "mine", FIELDS, episode_lengths=lengths)))


@pytest.fixture
def dataset(own_cache, tmp_path_factory):
    """Return a function that copies a dataset and deletes the copy before."""
    folder = tmp_path_factory.mktemp("fuzz")

    def copied(name):
        shutil.rmtree(folder)
        return Path(shutil.copytree(FIXTURES / name, folder / name))

    return copied


@examples(0.01)
@given(mutated(json.loads((FIXTURES / "lerobot_v3" / "meta" / "info.json").read_text())))
def test_lerobot_info(dataset, info):
    folder = dataset("lerobot_v3")
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    result_or_none(lambda: read_all(open_dataset(folder)))


@examples(0.01)
@given(st.data(), st.sampled_from(["info.json", "episodes.jsonl", "tasks.jsonl"]))
def test_older_lerobot_meta(dataset, data, name):
    folder = dataset("lerobot_v21")
    file = folder / "meta" / name
    lines = [
        json.loads(line) for line in ([file.read_text()] if name == "info.json" else file.read_text().splitlines())
    ]
    file.write_text("\n".join(map(json.dumps, data.draw(mutated(lines)))))
    result_or_none(lambda: read_all(open_dataset(folder)))


TABLES = {
    file: parquet.read_table(FIXTURES / "lerobot_v3" / file)
    for file in ("data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet")
}
CELLS = [
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(max_size=9),
    st.binary(max_size=9),
    st.booleans(),
    st.lists(st.floats(width=32), max_size=8),
    st.lists(st.lists(st.integers(0, 9), max_size=2), max_size=2),
    st.fixed_dictionaries({"bytes": st.none() | st.binary(max_size=9), "path": st.none() | st.text(max_size=9)}),
]


@st.composite
def tables(draw):
    """Draw a file of a dataset, and its table with a column that is removed or holds other values."""
    file = draw(st.sampled_from(sorted(TABLES)))
    table = TABLES[file]
    index = draw(st.integers(0, table.num_columns - 1))
    column, name = table.column(index), table.column_names[index]
    if draw(st.integers(0, 5)) == 0:
        return file, table.drop_columns([name])
    values, cells = column.to_pylist(), draw(st.sampled_from(CELLS)) | st.none()
    rows = range(len(values)) if draw(st.booleans()) else draw(st.lists(st.integers(0, len(values) - 1), max_size=2))
    for row in rows:
        values[row] = draw(cells)
    arrow_type = column.type if draw(st.booleans()) else None
    try:
        return file, table.set_column(index, name, pyarrow.chunked_array([pyarrow.array(values, arrow_type)]))
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):  # no column holds both
        return file, table.drop_columns([name])


@examples(0.02)
@given(tables())
def test_lerobot_tables(dataset, change):
    folder = dataset("lerobot_v3")
    try:
        parquet.write_table(change[1], folder / change[0])
    except pyarrow.ArrowException:  # parquet holds no such column
        return
    result_or_none(lambda: read_all(open_dataset(folder)))


HDF5 = {
    "obs/agentview_rgb": np.zeros((4, 9, 8, 3), np.uint8),
    "obs/eye_in_hand_rgb": np.zeros((4, 9, 8, 3), np.uint8),
    "obs/ee_states": np.zeros((4, 6)),
    "obs/gripper_states": np.zeros((4, 2)),
    "actions": np.linspace(-1, 1, 28).reshape(4, 7),
}


@examples(0.02)
@given(
    st.dictionaries(st.sampled_from([*HDF5, "task", "x"]), st.none() | arrays() | st.text(), max_size=2),
    st.dictionaries(
        st.sampled_from(["language_instruction", "problem_info", "ep_meta", "task"]),
        st.one_of(
            st.text(max_size=9),
            st.binary(max_size=9),
            numbers,
            json_junk.map(lambda value: json.dumps({"language_instruction": value, "lang": value})),
            arrays(),
        ),
        max_size=2,
    ),
)
def test_hdf5_files(own_cache, tmp_path_factory, columns, attributes):
    folder = tmp_path_factory.mktemp("fuzz")
    with h5py.File(folder / "demo.hdf5", "w") as file:
        try:
            for demo, change in ((0, columns), (1, {})):
                group = file.create_group(f"data/demo_{demo}")
                for name, values in {**HDF5, **change}.items():
                    if values is not None:
                        group[name] = values
            file["data/demo_0"].attrs.update(attributes)
        except (TypeError, ValueError, OSError, OverflowError):  # h5py stores no such value
            return
    fields = {"cameras": ["obs.agentview_rgb"], "action": "actions", "instruction_text": "go"}
    result_or_none(lambda: read_all(open_dataset(folder, fields={"rotate_180": False})))
    result_or_none(lambda: read_all(open_dataset(folder, preset=None, fields=fields)))
    shutil.rmtree(folder)


def record() -> bytes:
    from openvla.data.tfrecord import index_records, read_record

    file = next((FIXTURES / "bridge_orig").rglob("*.tfrecord*"))
    return read_record(file, index_records(file).records[0])


RECORD = record()


@examples(0.02)
@given(
    st.lists(st.tuples(st.integers(0, len(RECORD) - 1), st.integers(0, 255)), min_size=1, max_size=3), st.integers(0, 3)
)
def test_tfrecords(changes, cut):
    data = bytearray(RECORD)
    for offset, value in changes:
        data[offset] = value
    data = bytes(data[: len(data) - cut])
    result_or_none(parse_example, data, lambda name: True)


@examples(0.02)
@given(st.data(), st.sampled_from(["features.json", "dataset_info.json"]))
def test_rlds_descriptions(dataset, data, name):
    folder = dataset("bridge_orig")
    file = next(folder.rglob(name))
    file.write_text(json.dumps(data.draw(mutated(json.loads(file.read_text())))))
    result_or_none(lambda: read_all(open_dataset(folder)))


STEPS = rlds.episode_columns()


@st.composite
def record_columns(draw):
    """Draw the columns of an episode, one of them removed or replaced."""
    columns = dict(STEPS)
    name = draw(st.sampled_from([*columns, "is_first", "frame_index", "language_instruction_2"]))
    other = arrays(["uint8", "float32", "float64", "bool"]).filter(lambda values: values.ndim)
    change = draw(st.one_of(st.none(), other, st.lists(st.text(max_size=9) | st.binary(max_size=9), max_size=7)))
    return {**columns, name: change} if change is not None else {key: columns[key] for key in columns if key != name}


@examples(0.02)
@given(record_columns(), record_columns())
def test_rlds_records(own_cache, tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("fuzz")
    rlds.write_rlds(folder, "mine", [first, second])
    result_or_none(lambda: read_all(open_dataset(folder / "mine")))
    fields = {"cameras": ["observation.image"], "action": "action", "proprio": "observation.state"}
    result_or_none(lambda: read_all(open_dataset(folder / "mine", fields={**fields, "instruction_text": "go"})))
    shutil.rmtree(folder)


# --- the client -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile():
    with raw_server() as url_and_replies:
        yield url_and_replies


REPLY = {"__numpy__": base64.b64encode(np.zeros(7).tobytes()).decode(), "dtype": "<f8", "shape": [7]}
REFUSAL = {"error": {"message": "no", "field": "image", "id": "1", "code": None}}


@examples(0.03)
@given(
    st.one_of(mutated(REPLY), mutated(REFUSAL), json_junk).map(lambda reply: json.dumps(reply).encode())
    | st.binary(max_size=40),
    st.sampled_from([200, 204, 301, 400, 422, 500, 503, 504, 999]),
    st.dictionaries(
        st.sampled_from(["Retry-After", "Content-Length", "Transfer-Encoding"]),
        st.sampled_from(["0", "3", "-1", "9" * 400, "chunked", "", "x", "\u00b2"]),
    ),
    st.booleans(),
)
def test_replies_to_the_client(hostile, body, status, headers, has_head):
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
    hostile[1][0] = b"HTTP/1.1 %d x\r\n%s\r\n%s" % (status, head, body) if has_head else body
    client = PolicyClient(hostile[0], retries=0, timeout=0.3)
    action = result_or_none(client.act, np.zeros((2, 2, 3), np.uint8), "go")
    assert action is None or action.dtype == np.float64 and np.isfinite(action).all()
    assert isinstance(result_or_none(client.info), (dict, type(None)))
    client.close()
