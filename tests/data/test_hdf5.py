"""HDF5 of LIBERO, robomimic, ALOHA, RDT and RoboTwin: cameras, splits, colours, rotation, instructions."""

import io
import json

import numpy as np
import pytest
from PIL import Image

h5py = pytest.importorskip("h5py")

from openvla.data.columns import as_text  # noqa: E402
from openvla.data.episodes import DatasetError  # noqa: E402
from openvla.data.inspect import inspect  # noqa: E402
from openvla.data.open import open_dataset  # noqa: E402
from openvla.data.statistics import compute_statistics  # noqa: E402

STEPS = 4
UPRIGHT = np.zeros((STEPS, 16, 16, 3), np.uint8)
UPRIGHT[:, :8] = 255
RED = np.zeros((16, 16, 3), np.uint8)
RED[..., 0] = 240
ALOHA = tuple(f"observations/images/{name}" for name in ("cam_high", "cam_left_wrist", "cam_right_wrist"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))


def demo(file, number=0, frames=UPRIGHT, instruction="go", **columns):
    group = file.create_group(f"data/demo_{number}")
    group["actions"] = np.full((len(frames), 7), number / 8)
    group["obs/image"] = frames
    for name, values in columns.items():
        group[name.replace("__", "/")] = values
    if instruction is not None:
        group.attrs["language_instruction"] = instruction
    return group


def robomimic(path, masks=None):
    """Write four demos in robomimic's layout; pixels tell demo and step."""
    with h5py.File(path, "w") as file:
        for number in range(4):
            frames = np.stack([np.full((16, 16, 3), 50 * number + step, np.uint8) for step in range(STEPS + 1)])
            group = demo(file, number, frames[:-1])
            group["next_obs/image"], group["next_obs/pose"] = frames[1:], np.zeros((STEPS, 3))
            group["obs/empty"] = h5py.Empty("f8")
            group["obs/depth"] = np.zeros((STEPS, 16, 16, 1), np.float32)
            group["obs/image_segmentation"] = frames[:-1]
        for name, numbers in (masks or {}).items():
            file[f"mask/{name}"] = np.array([b"demo_%d" % number for number in numbers])
    return path


def test_future_and_depth_images_are_not_cameras(tmp_path):
    reader = open_dataset(robomimic(tmp_path / "image.hdf5"))
    assert reader.fields.cameras == ("obs.image",)
    assert [int(reader[2].images(step)[0][0, 0, 0]) for step in range(STEPS)] == [100, 101, 102, 103]
    notes = "\n".join(inspect(reader, progress=False)["notes"])
    assert "next_obs.image is not used as a camera: it holds frames from after the action" in notes
    assert "obs.depth is not used as a camera: it holds depth, masks" in notes
    assert "obs.image_segmentation is not used as a camera" in notes
    with pytest.raises(KeyError, match=r"no image column 'next_obs\.image' \(it holds frames from after the action\)"):
        open_dataset(tmp_path / "image.hdf5", fields={"cameras": ["next_obs.image"]})
    with pytest.raises(ValueError, match=r"proprio columns \['next_obs\.pose'\] are from after the action"):
        open_dataset(tmp_path / "image.hdf5", fields={"proprio": ["next_obs.pose"]})


@pytest.mark.parametrize(
    ("name", "is_camera"),
    [("next_obs/top", False), ("next/top", False), ("obs/next_image", False), ("obs/next_to_gripper", True)],
)
def test_names_of_future_observations(tmp_path, name, is_camera):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        demo(file)[name] = UPRIGHT
    cameras = open_dataset(tmp_path / "a.hdf5").fields.cameras
    assert (name.replace("/", ".") in cameras) == is_camera


def demos(reader):
    return [episode.id.rpartition(":")[2] for episode in reader]


def test_masks_are_splits(tmp_path):
    path = robomimic(tmp_path / "image.hdf5", {"train": (2, 0), "valid": (1, 3), "better": (3,)})
    expected = {"train": ["demo_0", "demo_2"], "valid": ["demo_1", "demo_3"], "better": ["demo_3"]}
    assert demos(open_dataset(path)) == expected["train"]
    for split, names in expected.items():
        reader = open_dataset(path, split=split)
        assert demos(reader) == names
        mean = np.mean([int(name[-1]) for name in names]) / 8  # the cache must not confuse them
        assert compute_statistics(reader, progress=False)["action"]["mean"] == [mean] * 7
    assert len(open_dataset(path, split="all")) == 4
    with pytest.raises(
        ValueError, match=r"no split 'val'\. Did you mean 'valid'\? Allowed: \['all', 'better', 'train'"
    ):
        open_dataset(path, split="val")


def test_splits_without_masks(tmp_path):
    plain = robomimic(tmp_path / "plain.hdf5")
    assert len(open_dataset(plain)) == len(open_dataset(plain, split="all")) == 4
    with pytest.raises(ValueError, match=r"no split 'valid'\..* Allowed: \['all', 'train'\]"):
        open_dataset(plain, split="valid")
    grades = robomimic(tmp_path / "grades.hdf5", {"better": (1,)})
    with h5py.File(grades, "r+") as file:
        file["mask/valid"] = np.zeros((16, 16), bool)  # of pixels: no split
    assert len(open_dataset(grades)) == 4
    with pytest.raises(ValueError, match=r"no mask 'train'; set split: one of \['all', 'valid'\]"):
        open_dataset(robomimic(tmp_path / "held.hdf5", {"valid": (1,)}))
    with pytest.raises(ValueError, match=r"mask 'train' names \['data/demo_9'\]"):
        open_dataset(robomimic(tmp_path / "gone.hdf5", {"train": (0, 9)}))
    with pytest.raises(ValueError, match=r"split 'train' has no episode; use another of \['all', 'train'\]"):
        open_dataset(robomimic(tmp_path / "empty.hdf5", {"train": ()}))


FRAMES = {
    "float": ((UPRIGHT / 255).astype(np.float32), r"float32 \(4, 16, 16, 3\)"),
    "channels first": (UPRIGHT.transpose(0, 3, 1, 2), r"uint8 \(4, 3, 16, 16\)"),
    "rgba": (np.concatenate([UPRIGHT, UPRIGHT[..., :1]], -1), r"uint8 \(4, 16, 16, 4\)"),
    "grey": (UPRIGHT[..., 0], r"uint8 \(4, 16, 16\)"),
    "grey, one channel": (UPRIGHT[..., :1], r"uint8 \(4, 16, 16, 1\)"),
}


@pytest.mark.parametrize("what", FRAMES)
def test_unreadable_frames_are_reported(tmp_path, what):
    frames, held = FRAMES[what]
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        demo(file, frames=frames)
    with pytest.raises(
        ValueError, match=rf"set the fields cameras and action\..* Not usable: obs\.image \({held}; frames must"
    ):
        open_dataset(tmp_path / "a.hdf5")
    with pytest.raises(KeyError, match=rf"no image column 'obs\.image' \(it holds {held}; frames must be uint8"):
        open_dataset(tmp_path / "a.hdf5", fields={"cameras": ["obs.image"], "action": ["actions"]})


def libero(path, attributes=None, frames=UPRIGHT[:, ::-1, ::-1], **columns):
    with h5py.File(path, "w") as file:
        group = demo(file, frames=frames, instruction=None, **columns)
        del group["obs/image"]
        group["obs/agentview_rgb"] = group["obs/eye_in_hand_rgb"] = frames
        group["obs/ee_states"], group["obs/gripper_states"] = np.zeros((STEPS, 6)), np.zeros((STEPS, 2))
        group["actions"][:, 6] = -1
        file["data"].attrs.update(attributes or {})
    return path


PROBLEM = {"problem_name": "libero_tabletop_manipulation", "language_instruction": "go"}
SIMULATED = {
    "problem_info": ("a", {"problem_info": json.dumps(PROBLEM)}),
    "bddl": ("a", {"bddl_file_name": "libero/bddl_files/libero_goal/go.bddl"}),
    "bytes": ("a", {"env_args": np.bytes_(json.dumps({"type": 1, "env_name": "Lift"}))}),
    "opengl": ("a", {"macros_image_convention": "opengl"}),
    "its name": ("LIVING_ROOM_SCENE2_go_demo", {}),
}


@pytest.mark.parametrize("evidence", SIMULATED)
def test_libero_frames_are_rotated(tmp_path, evidence):
    stem, attributes = SIMULATED[evidence]
    path = libero(tmp_path / f"{stem}.hdf5", attributes)
    episode = open_dataset(path, fields={"instruction_text": "go"})[0]
    np.testing.assert_array_equal(episode.images(0)[0], UPRIGHT[0])
    assert episode.actions[:, 6].tolist() == [1] * STEPS  # -1 opens


def test_regenerated_libero_is_known_by_its_states(tmp_path):
    states = {"states": np.zeros((STEPS, 9)), "robot_states": np.zeros((STEPS, 9))}
    episode = open_dataset(libero(tmp_path / "open_it_demo.hdf5", **states))[0]
    assert episode.instructions[0] == "open it"
    np.testing.assert_array_equal(episode.images(0)[0], UPRIGHT[0])


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"env_args": "{}"},
        {"problem_info": json.dumps({"language_instruction": "go"})},
        {"env_args": json.dumps({"type": 1}), "macros_image_convention": "opencv"},
    ],
)
def test_libero_columns_of_unknown_origin_need_rotate_180(tmp_path, attributes):
    path = libero(tmp_path / "real.hdf5", attributes, UPRIGHT)
    with pytest.raises(ValueError, match=r"real\.hdf5 has LIBERO's columns, but .*Set the field rotate_180: true"):
        open_dataset(path)
    for turned, shown in ((False, UPRIGHT), (True, UPRIGHT[:, ::-1, ::-1])):
        reader = open_dataset(path, fields={"rotate_180": turned, "instruction_text": "go"})
        np.testing.assert_array_equal(reader[0].images(1)[0], shown[1])
    assert open_dataset(path, preset="libero_hdf5").fields.rotate_180


def encoded(frame, kind="JPEG"):
    out = io.BytesIO()
    Image.fromarray(frame).save(out, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return out.getvalue()


def cv2_encoded(frame):
    """Return what cv2.imencode returns for an RGB array, which it takes for BGR."""
    return encoded(np.ascontiguousarray(frame[..., ::-1]))


def rows(data):
    """Return padded bytes as ALOHA stores them."""
    return np.tile(np.frombuffer(data + bytes(5), np.uint8), (STEPS, 1))


def fixed(data):
    """Return bytes of one length as RDT and RoboTwin store them."""
    return np.array([data] * STEPS, dtype=f"S{len(data) + 5}")


def variable(data):
    out = np.empty(STEPS, object)
    out[:] = [np.frombuffer(data, np.uint8)] * STEPS
    return out


def store(file, path, values):
    if values.dtype == object:
        file.create_dataset(path, data=values, dtype=h5py.vlen_dtype(np.uint8))
    else:
        file[path] = values


def first_pixel(path, **fields):
    reader = open_dataset(path, fields={"instruction_text": "go", **fields})
    return reader[0].images(STEPS - 1)[0][5, 5].astype(int), reader


@pytest.mark.parametrize("storage", [rows, fixed, variable])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_encoded_frames_are_detected_by_signature(tmp_path, storage, kind):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["action"] = np.zeros((STEPS, 7))
        store(file, "view/front", storage(encoded(RED, kind)))
        file["view/words"] = np.array([b"no picture"] * STEPS)
    pixel, reader = first_pixel(tmp_path / "a.hdf5")
    assert reader.fields.cameras == ("view.front",)
    np.testing.assert_allclose(pixel, [240, 0, 0], atol=3)
    assert "view.front holds encoded images, read as RGB;" in reader.notes()[0]
    pixel, reader = first_pixel(tmp_path / "a.hdf5", channels="bgr")
    np.testing.assert_allclose(pixel, [0, 0, 240], atol=3)
    assert reader.notes() == []


def aloha(path, values, **attributes):
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        file["action"] = file["observations/qpos"] = np.random.RandomState(0).rand(STEPS, 14)
        for camera in ALOHA:
            file[camera] = values
    return path


@pytest.mark.parametrize(
    ("values", "attributes", "fields", "expected"),
    [
        (rows(cv2_encoded(RED)), {"compress": True}, {}, [240, 0, 0]),  # ALOHA's own recorder
        (fixed(cv2_encoded(RED)), {}, {}, [240, 0, 0]),  # RDT, AgileX
        (np.stack([RED] * STEPS), {"compress": False}, {}, [240, 0, 0]),
        (np.stack([RED] * STEPS), {"compress": True}, {}, [240, 0, 0]),
        (rows(encoded(RED)), {"compress": True}, {"channels": "rgb"}, [240, 0, 0]),
        (rows(cv2_encoded(RED)), {}, {"channels": "bgr"}, [240, 0, 0]),
        (np.stack([RED[..., ::-1]] * STEPS), {}, {"channels": "bgr"}, [240, 0, 0]),
    ],
)
def test_channel_order_of_aloha(tmp_path, values, attributes, fields, expected):
    pixel, _ = first_pixel(aloha(tmp_path / "episode_0.hdf5", values, **attributes), **fields)
    np.testing.assert_allclose(pixel, expected, atol=3)


def test_channel_order_of_robotwin(tmp_path):
    with h5py.File(tmp_path / "episode0.hdf5", "w") as file:
        file["joint_action/vector"] = np.zeros((STEPS, 14))
        file["observation/head_camera/rgb"] = fixed(cv2_encoded(RED))
    with pytest.raises(
        ValueError, match=r"Images: \['observation.head_camera.rgb'\]; numbers: \['joint_action.vector'"
    ):
        open_dataset(tmp_path / "episode0.hdf5")
    columns = {"cameras": ["observation/head_camera/rgb"], "action": ["joint_action/vector"]}
    pixel, reader = first_pixel(tmp_path / "episode0.hdf5", **columns)
    np.testing.assert_allclose(pixel, [240, 0, 0], atol=3)
    assert (
        "read as BGR; if red and blue are swapped (OpenCV encodes BGR), set the field channels: rgb"
        in (reader.notes()[0])
    )
    with pytest.raises(ValueError, match=r"Unknown channels 'brg'\. Allowed: \[None, 'rgb', 'bgr'\]"):
        first_pixel(tmp_path / "episode0.hdf5", **columns, channels="brg")


STORED_INSTRUCTIONS = {
    "str": "pick up the cup",
    "bytes": np.bytes_("pick up the cup"),
    "array of bytes": np.array([b"pick up the cup"]),
    "array of str": np.array(["pick up the cup"], dtype=h5py.string_dtype()),
    "padded bytes": np.array(b"pick up the cup\0\0"),
}


@pytest.mark.parametrize("kind", STORED_INSTRUCTIONS)
def test_instruction_in_an_attribute(tmp_path, kind):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        demo(file, instruction=STORED_INSTRUCTIONS[kind])
    assert set(open_dataset(tmp_path / "a.hdf5")[0].instructions) == {"pick up the cup"}


@pytest.mark.parametrize(
    "key", ["language_raw", "language_instruction", "obs/language_instruction", "task_description"]
)
@pytest.mark.parametrize("count", [0, 1, STEPS])
def test_instruction_in_a_column(tmp_path, key, count):
    texts = [f"pick up {step}".encode() for step in range(count)]
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        demo(file, instruction=None)[key] = np.array(texts) if count else b"pick up 0"
    expected = [f"pick up {step if count > 1 else 0}" for step in range(STEPS)]
    assert list(open_dataset(tmp_path / "a.hdf5")[0].instructions) == expected
    fields = {"instruction": f"{key}"}
    if "/" not in key:
        assert list(open_dataset(tmp_path / "a.hdf5", fields=fields)[0].instructions) == expected


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"task_description": "its own words"}, "its own words"),
        ({"problem_info": json.dumps({"language_instruction": ["its", "own", "words"]})}, "its own words"),
        ({"ep_meta": json.dumps({"lang": "its own words"})}, "its own words"),
        ({"language": "its own words", "lang": "en", "task": 3}, "its own words"),
        ({"language": "en", "task": 3, "prompt": "Lift"}, "the file's"),
        ({}, "the file's"),
    ],
)
def test_instruction_of_the_demo_precedes_that_of_the_file(tmp_path, attributes, expected):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        demo(file, instruction=None).attrs.update(attributes)
        demo(file, 1, instruction="another")
        file["data"].attrs["problem_info"] = np.bytes_(json.dumps({"language_instruction": "the file's"}))
    assert [episode.instructions[0] for episode in open_dataset(tmp_path / "a.hdf5")] == [expected, "another"]


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("", "the instruction at step 0 is empty"),
        (np.array([b"one", b"two"]), "must be one text, got array"),
        ("b'pick up'", "is the repr of Python bytes"),
        (np.bytes_(b"caf\xe9"), "is not UTF-8"),
    ],
)
def test_unusable_instruction_of_a_demo_is_refused(tmp_path, instruction, message):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        demo(file)
        demo(file, 1, instruction=instruction)
        file["data"].attrs["language_instruction"] = "the file's"
    reader = open_dataset(tmp_path / "a.hdf5")
    assert len(reader[0]) == STEPS
    with pytest.raises(DatasetError, match=rf"a\.hdf5:demo_1: .*{message}"):
        reader[1]


def test_step_without_instruction_is_refused(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        demo(file, instruction=None)["language_instruction"] = np.array([b"go", b"go", b" ", b"go"])
        demo(file, 1, instruction=None)["language_instruction"] = np.array([b"go"] * (STEPS + 1))
    reader = open_dataset(tmp_path / "a.hdf5")
    with pytest.raises(DatasetError, match="the instruction at step 2 is empty"):
        reader[0]
    with pytest.raises(DatasetError, match="4 actions but 5 instructions"):
        reader[1]


def test_as_text_of_all_types():
    for value in ("go", b"go", np.bytes_("go"), np.str_("go"), np.array(["go"]), [b"go"], np.array([["go"]], object)):
        assert as_text(value) == "go"
        assert type(as_text(value)) is str
    assert [as_text(value) for value in (None, float("nan"), "", b"", "bring it")] == ["", "", "", "", "bring it"]
    for value in (3, ["a", "b"], np.zeros(2)):
        with pytest.raises(ValueError, match="must be one text"):
            as_text(value)


def test_empty_first_demo_does_not_hide_cameras(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        empty, full = file.create_group("data/demo_0"), file.create_group("data/demo_1")
        empty["actions"], full["actions"] = np.zeros((0, 7)), np.zeros((STEPS, 7))
        empty["obs/front"], full["obs/front"] = np.zeros(0, "S9"), fixed(encoded(RED))
    reader = open_dataset(tmp_path / "a.hdf5", fields={"instruction_text": "go"})
    assert reader.fields.cameras == ("obs.front",)
    assert len(reader[1]) == STEPS
    with pytest.raises(DatasetError, match="it has no step"):
        reader[0]


def test_held_out_part_requires_a_split(tmp_path):
    file = robomimic(tmp_path / "a.hdf5", {"20_percent_train": [1], "20_percent_valid": [2]})
    with pytest.raises(ValueError, match="20_percent_valid.*but no mask 'train'; set split: one of"):
        open_dataset(file)
    assert demos(open_dataset(file, split="20_percent_train")) == ["demo_1"]
    only = robomimic(tmp_path / "b.hdf5", {"20_percent": [1]})
    assert len(open_dataset(only)) == len(open_dataset(only, split="all"))


@pytest.mark.parametrize("name", ["goal/top", "obs/goal_image", "obs/subgoal_img", "obs/infrared"])
def test_goal_images_are_not_cameras(tmp_path, name):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        demo(file)[name] = UPRIGHT
    reader = open_dataset(tmp_path / "a.hdf5")
    assert name.replace("/", ".") not in reader.fields.cameras
    with pytest.warns(UserWarning, match="seems to hold depth, masks"):
        open_dataset(tmp_path / "a.hdf5", fields={"cameras": [name]})


def test_robomimic_04_is_read(tmp_path):
    """Robomimic 0.4: action_dict, the language in ep_meta, camera poses beside the frames, filter keys."""
    action = np.random.RandomState(0).uniform(-1, 1, (STEPS, 7))
    with h5py.File(tmp_path / "image.hdf5", "w") as file:
        for number in range(2):
            group = demo(file, number, UPRIGHT, None)
            group.move("obs/image", "obs/robot0_agentview_left_image")
            del group["actions"]
            group["actions"], group["actions_abs"] = action, action + 1
            for name, width in (("rel_pos", 3), ("rel_rot_axis_angle", 3), ("rel_rot_6d", 6), ("gripper", 1)):
                group[f"action_dict/{name}"] = np.zeros((STEPS, width))
            group["obs/robot0_eef_pos"] = action[:, :3]
            group["camera_info/robot0_agentview_left/extrinsic"] = np.zeros((STEPS, 4, 4))
            group["states"], group["rewards"] = np.zeros((STEPS, 45)), np.zeros(STEPS)
            group.attrs["model_file"], group.attrs["num_samples"] = "<mujoco/>", STEPS
            group.attrs["ep_meta"] = json.dumps({"lang": f"open drawer {number}", "layout_id": 3})
        environment = {"env_name": "OpenDrawer", "env_version": "1.5.1", "type": 1, "env_kwargs": {}}
        file["data"].attrs["env_args"] = json.dumps(environment)
        file["mask/train"], file["mask/valid"] = np.array([b"demo_0"]), np.array([b"demo_1"])
    fields = {"proprio": ["obs.robot0_eef_pos"]}
    reader = open_dataset(tmp_path / "image.hdf5", fields=fields)
    assert reader.fields.cameras == ("obs.robot0_agentview_left_image",)
    assert [episode.instructions[0] for episode in reader] == ["open drawer 0"]
    np.testing.assert_array_equal(reader[0].actions, action)
    np.testing.assert_array_equal(reader[0].proprio, action[:, :3])
    np.testing.assert_array_equal(reader[0].images(0)[0], UPRIGHT[0])
    valid = open_dataset(tmp_path / "image.hdf5", fields=fields, split="valid")
    assert [episode.instructions[0] for episode in valid] == ["open drawer 1"]
