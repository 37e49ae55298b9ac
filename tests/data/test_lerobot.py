"""Unusual LeRobot and RLDS datasets: rows out of order, other files, splits, task tables, depth maps and names."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from encoded_images import jpeg, shown_level, write_video
from make_data import LENGTHS, TASKS, TOP_FRAMES
from rlds import episode_columns, write_rlds

pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402
from openvla.data.columns import is_non_camera_name  # noqa: E402
from openvla.data.episodes import DatasetError  # noqa: E402
from openvla.data.lerobot_writer import LeRobotWriter  # noqa: E402
from openvla.data.open import open_dataset  # noqa: E402
from openvla.data.stream import StepStream  # noqa: E402
from reference import FIXTURES  # noqa: E402

LEROBOT = ("lerobot_v21", "lerobot_v3")


@pytest.fixture
def copy(tmp_path):
    """Return a function that copies a dataset, to change it."""

    def copied(name):
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copied


@pytest.fixture
def small(tmp_path):
    """A dataset of three episodes of four steps in three files; actions and pixels tell episode and step."""
    cameras = {"observation/images.top": (8, 8), "observation/images.depth": (8, 8)}
    folder = tmp_path / "mine"
    writer = LeRobotWriter(folder, fps=10, numbers={"action": list("ab"), "observation/state": ["c"]}, cameras=cameras)
    for episode in range(3):
        steps = episode + np.arange(4)[:, None] / 10
        columns = {"action": np.repeat(steps, 2, axis=1), "observation/state": steps}
        frames = {camera: [jpeg(50 * episode + 10 * step) for step in range(4)] for camera in cameras}
        writer.add_episode(("first", "second", "third")[episode], columns, frames)
    return folder


def rewrite(folder, pattern, change):
    """Replace the rows of every matching parquet file."""
    files = sorted(folder.glob(pattern))
    assert files
    for file in files:
        pq.write_table(change(pq.read_table(file)), file)


def info(folder, **changed):
    file = folder / "meta" / "info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def assert_equal_episodes(folder, name):
    """Check every number, text and frame against the dataset as it was written."""
    for read, right in zip(open_dataset(folder), open_dataset(FIXTURES / name), strict=True):
        np.testing.assert_array_equal(read.actions, right.actions)
        np.testing.assert_array_equal(read.proprio, right.proprio)
        assert list(read.instructions) == list(right.instructions)
        for step in range(len(right)):
            for image, expected in zip(read.images(step), right.images(step), strict=True):
                np.testing.assert_array_equal(image, expected)


def shuffled(table):
    return table.take(np.random.default_rng(0).permutation(len(table)))


def halves_exchanged(table):
    return pa.concat_tables([table.slice(len(table) // 2), table.slice(0, len(table) // 2)])


@pytest.mark.parametrize("change", [shuffled, halves_exchanged])
@pytest.mark.parametrize("name", LEROBOT)
def test_rows_are_sorted_by_frame_index(copy, name, change):
    """Numbers, images in the table and frames of videos are sorted; in v3 episode_index decreases, too."""
    folder = copy(name)
    rewrite(folder, "data/*/*.parquet", change)
    assert_equal_episodes(folder, name)


@pytest.mark.parametrize("dropped", [["frame_index"], ["frame_index", "index"]])
def test_next_counter_orders_without_frame_index(copy, dropped):
    folder = copy("lerobot_v3")
    rewrite(folder, "data/*/*.parquet", lambda table: shuffled(table).drop_columns(dropped))
    assert_equal_episodes(folder, "lerobot_v3")


def changed_column(name, change):
    def apply(table):
        values = change(table[name].to_numpy().copy())
        return table.set_column(table.column_names.index(name), name, pa.array(values))

    return apply


def with_values(*changes):
    """Return a function that sets values of an array at indices."""

    def change(values):
        for index, value in changes:
            values[index] = value
        return values

    return change


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("frame_index", with_values((2, 1)), "frame_index 1 is duplicated"),
        ("frame_index", with_values((6, 8)), "frames are missing before frame_index 8"),
        ("index", with_values((2, 5)), "index decreases at step 3, in the order of frame_index"),
        ("timestamp", with_values((2, 0.35)), "timestamp decreases at step 3, in the order of frame_index"),
        ("timestamp", with_values((2, 0.1)), "timestamp 0.1 is duplicated"),  # which frame of the video?
        ("timestamp", with_values((2, np.nan)), "timestamp is not a number in row 2"),
        ("task_index", with_values((2, 9)), "task_index 9 is not in meta/tasks"),
    ],
)
def test_contradicting_counters_are_refused(copy, column, change, message):
    folder = copy("lerobot_v3")
    rewrite(folder, "data/*/*.parquet", changed_column(column, change))
    reader = open_dataset(folder)
    with pytest.raises(DatasetError, match=rf"episode 0: {message}"):
        reader[0]
    assert len(reader[1]) == LENGTHS[1]


def test_frame_index_may_start_at_any_number(copy):
    folder = copy("lerobot_v3")
    rewrite(folder, "data/*/*.parquet", changed_column("frame_index", lambda values: values + 5))
    assert_equal_episodes(folder, "lerobot_v3")


def test_duplicated_episode_is_refused(copy):
    folder = copy("lerobot_v21")
    file = folder / "meta" / "episodes.jsonl"
    file.write_text(file.read_text() + file.read_text().splitlines()[1])
    with pytest.raises(ValueError, match=r"must name every episode once; these are duplicated: \[1\]"):
        open_dataset(folder)


def summarize(folder, **options):
    """Return id, an action, instruction and a pixel of every episode."""
    return [
        (
            episode.id,
            round(float(episode.actions[1, 0]), 1),
            episode.instructions[0],
            int(episode.images(1)[0][0, 0, 0]),
        )
        for episode in open_dataset(folder, **options)
    ]


SMALL = [("0", 0.1, "first", 10), ("1", 1.1, "second", 60), ("2", 2.1, "third", 110)]


def test_features_that_differ_only_in_separators_are_refused(small):
    features = json.loads((small / "meta" / "info.json").read_text())["features"]
    info(small, features={**features, "observation.state": features["observation/state"]})
    with pytest.raises(ValueError, match="must name features that differ in more than dots and slashes"):
        open_dataset(small)


def test_slashes_and_dots_are_equivalent(small):
    reader = open_dataset(small)
    assert (reader.fields.cameras, reader.fields.proprio) == (("observation.images.top",), ("observation.state",))
    for camera in ("observation/images.top", "observation.images.top", "observation/images/top"):
        reader = open_dataset(small, fields={"cameras": [camera], "proprio": "observation/state"})
        assert [int(image[0, 0, 0]) for image in reader[2].images(3)] == [130]
        assert reader[2].proprio[3, 0] == pytest.approx(2.3)


@pytest.mark.parametrize("number", [0, 7])
def test_wrong_file_index_falls_back_to_a_search(small, number):
    def change(table):
        return table.set_column(
            table.column_names.index("data/file_index"), "data/file_index", pa.array([0, 1, number])
        )

    rewrite(small, "meta/episodes/*/*.parquet", change)
    assert summarize(small) == SMALL
    right = small / "data/chunk-000/file-002.parquet"
    shutil.copy(right, right.with_name("file-009.parquet"))
    with pytest.raises(DatasetError, match=r"episode 2: .* has no row of it, and 2 other files have all 4"):
        open_dataset(small)[2]
    right.unlink()
    assert summarize(small) == SMALL
    right.with_name("file-009.parquet").unlink()
    reader = open_dataset(small)
    with pytest.raises(DatasetError, match=r"episode 2: .* has no row of it, and 0 other files have all 4"):
        reader[2]
    assert reader[1].id == "1"


def test_task_column_is_found_by_name(small):
    file = small / "meta" / "tasks.parquet"
    table = pq.read_table(file)
    texts, numbers = table["__index_level_0__"], table["task_index"]
    other = pa.array(["kitchen", "lab", "lab"])
    for columns in (
        {"category": other, "task_index": numbers, "task": texts},
        {"category": other, "task_index": numbers, "__index_level_0__": texts},
        {"place": numbers, "task_index": numbers, "words": texts},
    ):
        pq.write_table(pa.table(columns).take([2, 0, 1]), file)
        assert summarize(small) == SMALL
    pq.write_table(pa.table({"category": other, "task_index": numbers, "words": texts}), file)
    with pytest.raises(ValueError, match=r"must hold the task's text in a column named .*'category', 'words'"):
        open_dataset(small)
    assert open_dataset(small, fields={"instruction_text": "go"})[2].instructions[0] == "go"


def test_splits_follow_info_json(small):
    info(small, splits={"train": "0:2", "val": "2:3"})
    assert summarize(small) == SMALL[:2]
    assert summarize(small, split="val") == SMALL[2:]
    assert summarize(small, split="all") == SMALL
    digests = {open_dataset(small, split=split).digest() for split in ("train", "val", "all")}
    assert len(digests) == 3  # whose statistics are others
    with pytest.raises(ValueError, match=r"no split 'test'; use one of \['train', 'val', 'all'\]"):
        open_dataset(small, split="test")
    info(small, splits={"train": "0:1", "val": "1:2"})
    with pytest.warns(UserWarning, match="1 of 3 episodes are in no split"):
        assert summarize(small) == SMALL[:1]
    info(small, splits={"train": "80%"})
    with pytest.raises(ValueError, match="'train' of info.json must be a range such as '0:80', got '80%'"):
        open_dataset(small)
    info(small, splits={})
    assert summarize(small) == SMALL
    with pytest.raises(ValueError, match=r"no split 'val'; use one of \['train', 'all'\]"):
        open_dataset(small, split="val")


@pytest.mark.parametrize(
    "about",
    [
        {"info": {"is_depth_map": True}},
        {"info": {"video.is_depth_map": True}},
        {"video_info": {"video.is_depth_map": True}},
        {"info": {"video.pix_fmt": "gray12le", "video.is_depth_map": False}},
    ],
)
def test_depth_map_is_not_a_camera(copy, about):
    folder = copy("lerobot_v3")
    features = json.loads((folder / "meta" / "info.json").read_text())["features"]
    features["observation.images.top"].update(about)
    info(folder, features=features)
    assert open_dataset(folder).fields.cameras == ("observation.images.wrist",)
    with pytest.raises(KeyError, match=r"no image column 'observation\.images\.top' \(it holds depth data\)"):
        open_dataset(folder, fields={"cameras": ["observation.images.top"]})


def test_possible_depth_camera_warns_when_named(small, tmp_path):
    assert open_dataset(small).fields.cameras == ("observation.images.top",)
    with pytest.warns(UserWarning, match=r"'observation\.images\.depth' seems to hold depth, masks"):
        reader = open_dataset(small, fields={"cameras": ["observation.images.depth"]})
    assert int(reader[1].images(2)[0][0, 0, 0]) == 70
    features = json.loads((small / "meta" / "info.json").read_text())["features"]
    for shape, names in (([1, 8, 8], ["channels", "height", "width"]), ([1, 8, 8], None), ([8, 8, 1], None)):
        features["observation/images.top"].update(shape=shape, names=names)
        info(small, features=features)
        with pytest.raises(ValueError, match="cameras and action cannot be detected"):
            open_dataset(small)
    with pytest.warns(UserWarning, match=r"'observation\.images\.top' seems to hold depth, masks"):
        open_dataset(small, fields={"cameras": ["observation.images.top"], "action": "action"})
    episode = episode_columns(**{"observation/depth_image": [jpeg(1)] * 6})
    assert open_dataset(write_rlds(tmp_path, "rgbd", [episode])).fields.cameras == ("observation.image",)


def test_empty_instruction_falls_back_to_the_next_column(copy):
    folder = copy("lerobot_v21")
    features = json.loads((folder / "meta" / "info.json").read_text())["features"]
    names = ("language_instruction", "language_instruction_2")
    info(folder, features={**features, **{name: {"dtype": "string", "shape": [1]} for name in names}})

    def change(table):
        empty, full = pa.array(["", None, *["say"] * (len(table) - 2)]), pa.array(["two"] * len(table))
        return table.append_column(names[0], empty).append_column(names[1], full)

    rewrite(folder, "data/*/*.parquet", change)
    episode = open_dataset(folder, fields={"instruction": names[0]})[0]
    assert list(episode.instructions) == ["two", "two", *["say"] * (LENGTHS[0] - 2)]
    assert open_dataset(folder)[0].instructions[0] == TASKS[0]


@pytest.mark.parametrize("column", ["frame_index", "step_index"])
def test_rlds_steps_are_sorted_by_their_counter(tmp_path, column):
    order = np.array([3, 1, 5, 0, 2, 4])
    whole = episode_columns(**{"language_instruction": [f"say {step}" for step in range(6)]})
    whole[column] = np.arange(6)
    whole["is_first"], whole["is_last"] = np.arange(6) == 0, np.arange(6) == 5
    mixed = {k: [v[i] for i in order] if isinstance(v, list) else v[order] for k, v in whole.items()}
    read, right = list(open_dataset(write_rlds(tmp_path, "mine", [mixed, whole])))
    np.testing.assert_array_equal(read.actions, right.actions)
    np.testing.assert_array_equal(right.actions, whole["action"])
    assert list(read.instructions) == list(right.instructions) == whole["language_instruction"]
    assert [int(read.images(step)[0][0, 0, 0]) for step in range(6)] == [0, 20, 40, 60, 80, 100]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frame_index": np.array([0, 1, 1, 2, 3, 4])}, "frame_index 1 is duplicated"),
        ({"step_index": np.array([0, 1, 2, 4, 5, 6])}, "frames are missing"),
        ({"is_first": np.array([True, False, False, True, False, False])}, "is_first is set at step 3 of 6"),
        ({"is_last": np.array([False, False, True, False, False, True])}, "is_last is set at step 2 of 6"),
    ],
)
def test_contradicting_rlds_steps_are_refused(tmp_path, changed, message):
    names = {name: np.zeros(6, values.dtype) for name, values in changed.items() if values.dtype == bool}
    right = episode_columns(**{**changed, **names, **{name: np.arange(6) for name in changed if name not in names}})
    reader = open_dataset(write_rlds(tmp_path, "mine", [episode_columns(**changed), right]))
    assert len(reader[1]) == 6
    with pytest.raises(DatasetError, match=f"episode .*:0: {message}"):
        reader[0]


def test_rlds_episode_without_steps_is_refused(tmp_path):
    empty = episode_columns(0)
    reader = open_dataset(write_rlds(tmp_path, "mine", [episode_columns(), empty]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DatasetError, match="the episode has no steps"):
            reader[1]


@pytest.mark.parametrize(
    "about",
    [
        {"info": {"video": {"is_depth_map": True}}},
        {"metadata": {"is_depth_map": "true"}},
        {"info": {"stream": {"video.pix_fmt": "gray12le"}}},
    ],
)
def test_depth_map_is_detected_in_nested_entries(small, about):
    features = json.loads((small / "meta" / "info.json").read_text())["features"]
    features["observation/images.wrist"] = features.pop("observation/images.depth")
    rewrite(
        small, "data/**/*.parquet", lambda t: t.rename_columns([n.replace("depth", "wrist") for n in t.column_names])
    )
    info(small, features=features)
    both = ("observation.images.top", "observation.images.wrist")
    assert open_dataset(small).fields.cameras == both
    not_depth = {**features["observation/images.wrist"], "info": {"is_depth_map": "False"}}
    info(small, features={**features, "observation/images.wrist": not_depth})
    assert open_dataset(small).fields.cameras == both
    info(small, features={**features, "observation/images.wrist": {**features["observation/images.wrist"], **about}})
    reader = open_dataset(small)
    assert reader.fields.cameras == both[:1]
    assert reader.notes() == ["observation.images.wrist is not used as a camera: it holds depth data"]


@pytest.mark.parametrize(
    ("name", "is_camera"),
    [
        *(
            (name, False)
            for name in ("infra1", "ir_left", "top_disparity", "seg", "front_mask", "goal_image", "thermal")
        ),
        *((name, True) for name in ("wrist", "mirror", "first_person", "infrastructure", "segway", "dir_left")),
    ],
)
def test_non_camera_names(name, is_camera):
    assert is_non_camera_name(f"observation.images.{name}") is not is_camera
    assert is_non_camera_name(f"obs/{name}") is not is_camera


@pytest.mark.parametrize("text", ["nan", "None", " NULL ", "N/A", "<NA>"])
def test_spellings_of_a_missing_instruction_are_empty(small, text):
    tasks = pa.table({"task_index": [0, 1, 2], "task": ["first", text, "third"]})
    pq.write_table(tasks, small / "meta" / "tasks.parquet")
    reader = open_dataset(small)
    assert reader[0].instructions[0] == "first"
    with pytest.raises(DatasetError, match=r"the instruction at step 0 is empty \("):
        reader[1]
    assert open_dataset(small, fields={"instruction_text": "go"})[1].instructions[0] == "go"


def test_contradicting_instructions_warn_once(small):
    turned = changed_column("task_index", lambda values: (values + 1) % 3)
    rewrite(small, "data/**/*.parquet", turned)
    reader = open_dataset(small)
    with pytest.warns(UserWarning, match=r"the instruction 'second', but meta/episodes \['first'\]") as seen:
        assert [episode.instructions[0] for episode in reader] == ["second", "third", "first"]
    assert len(seen) == 1


def test_renamed_tasks_do_not_warn(small):
    tasks = pa.table({"task_index": [0, 1, 2], "task": ["a", "b", "c"]})
    pq.write_table(tasks, small / "meta" / "tasks.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [episode.instructions[0] for episode in open_dataset(small)] == ["a", "b", "c"]


def test_other_number_of_episodes_than_info_json_warns(small):
    rewrite(small, "meta/episodes/**/*.parquet", lambda table: table.slice(0, 2))
    with pytest.warns(UserWarning, match="info.json says 3 episodes, but .* has 2; if the dataset is incomplete"):
        assert len(open_dataset(small)) == 2


def test_mixed_frame_rates_warn(small, tmp_path):
    other = Path(shutil.copytree(small, tmp_path / "other"))
    readers = [open_dataset(folder) for folder in (small, other)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StepStream(readers)
    info(other, fps=50)
    readers[1] = open_dataset(other)
    with pytest.warns(UserWarning, match=r"different frame rates \(Hz\): {'mine': 10.0, 'other': 50.0}"):
        StepStream(readers)


def test_missing_rlds_instruction_falls_back_to_the_next_column(tmp_path):
    columns = {"language_instruction": ["nan"] * 6, "language_instruction_2": ["pick it"] * 6}
    reader = open_dataset(write_rlds(tmp_path, "spoken", [episode_columns(**columns)]))
    assert reader[0].instructions == ["pick it"] * 6
    goal = episode_columns(**{"observation/goal_image": [jpeg(1)] * 6})
    reader = open_dataset(write_rlds(tmp_path, "with_goals", [goal]))
    assert reader.fields.cameras == ("observation.image",)
    assert reader.notes()[0].startswith(
        "observation.goal_image is not used as a camera: it holds depth, masks, infrared, touch or a goal"
    )


def test_null_rows_are_refused(copy):
    def without_two(table):
        rows = table["action"].to_pylist()
        index = table.column_names.index("action")
        rows[1] = rows[3] = None
        return table.set_column(index, "action", pa.array(rows, table["action"].type))

    folder = copy("lerobot_v3")
    rewrite(folder, "data/**/*.parquet", without_two)
    with pytest.raises(DatasetError, match="2 of 7 rows are null"):
        open_dataset(folder)[0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": None}, "must describe every feature"),
        ({"features": {"action": {"shape": [7]}}}, "must describe every feature"),
        ({"splits": ["train"]}, "splits of info.json must name ranges"),
        ({"data_path": "data/{episode_index}.parquet"}, "data_path of info.json must be a path with the placeholders"),
        ({"video_path": None}, "video_path of info.json must be a path"),
        ({"codebase_version": "v2.1", "chunks_size": 0}, "data_path of info.json must be a path"),
    ],
)
def test_damaged_info_json_is_refused(copy, changed, message):
    folder = copy("lerobot_v3")
    info(folder, **changed)
    with pytest.raises(ValueError, match=message):
        open_dataset(folder)


def test_chunks_size_zero_is_refused(copy):
    folder = copy("lerobot_v21")
    info(folder, chunks_size=0)
    with pytest.raises(ValueError, match="chunks_size of info.json must be a whole number above 0, got 0"):
        open_dataset(folder)


def test_several_chunks_and_files_equal_lerobot():
    """A dataset of lerobot 0.6.1's aggregate_datasets with one episode a file, two files a chunk."""
    golden = np.load(FIXTURES / "lerobot_v3_files.npz")
    reader = open_dataset(FIXTURES / "lerobot_v3_files")
    assert len({path.parent.name for path in reader.files if "data" in path.parts}) == 2
    assert reader.fields.cameras == ("observation.images.top", "observation.images.side")
    np.testing.assert_array_equal(np.concatenate([episode.actions for episode in reader]), golden["action"])
    assert [text for episode in reader for text in episode.instructions] == golden["task"].tolist()
    frames = [episode.images(step) for episode in reader for step in range(len(episode))]
    for camera, name in enumerate(("top", "side")):
        read = np.stack([frames[index][camera] for index in TOP_FRAMES])
        np.testing.assert_array_equal(read, golden[name])


def with_rate(folder, rate):
    """Replace the camera's video of a LeRobot dataset by one with frames of 10, 20, ... at another rate."""
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    features["observation.images.top"]["info"]["video.fps"] = rate
    info(folder, features=features)
    write_video(next(folder.rglob("*.mp4")), range(0, 250, 5), rate)
    return folder


def test_a_camera_of_a_multiple_of_the_datasets_rate_is_read_at_the_steps_times(copy):
    reader = open_dataset(with_rate(copy("lerobot_v3"), 20), fields={"cameras": ["observation.images.top"]})
    levels = [shown_level(episode.images(step)[0], 5) for episode in reader for step in range(len(episode))]
    assert levels == list(range(0, 10 * sum(LENGTHS), 10))  # every second frame


def test_a_camera_without_frames_at_the_steps_times_is_refused(copy):
    episode = open_dataset(with_rate(copy("lerobot_v3"), 15), fields={"cameras": ["observation.images.top"]})[0]
    assert shown_level(episode.images(0)[0], 5) == 0
    message = r"no frame at 0.1000 s: the nearest is at 0.1333 s. info.json says .* has 15 frames a second and the data"
    with pytest.raises(DatasetError, match=message):
        episode.images(1)
