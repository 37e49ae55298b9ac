"""Write the datasets of tests/fixtures with the formats' libraries, and store what these libraries read back.

Each part runs where its libraries are installed (tests/fixtures/README.md); the tests import only the constants and the
functions for columns, images and numbers.

    python tests/make_data.py rlds tests/fixtures               # tensorflow-cpu, tensorflow-datasets
    python tests/make_data.py droid tests/fixtures --reference openvla-oft/     # tensorflow-cpu, tensorflow-datasets
    python tests/make_data.py presets tests/fixtures --reference openvla-oft/   # tensorflow-cpu
    python tests/make_data.py lerobot tests/fixtures            # lerobot-dataset 0.4.4: v3.0
    python tests/make_data.py lerobot tests/fixtures            # lerobot 0.3.2: v2.1
    python tests/make_data.py lerobot_files tests/fixtures      # lerobot 0.6.1: v3.0 with several chunks and files
    python tests/make_data.py hdf5 tests/fixtures               # h5py
    python tests/make_data.py zarr tests/fixtures               # zarr 2, imagecodecs
    python tests/make_data.py episode tests/fixtures --reference demos/libero_object_no_noops   # pyarrow
"""

import argparse
import json
import shutil
import sys
import types
import zlib
from pathlib import Path

import numpy as np

LENGTHS = (7, 5, 9)
TASKS = ("pick up the red block", "open the drawer", "pick up the red block")
FPS = 10
# Actions per chunk.
CHUNK = 4
# Indices of the video frames that are stored.
TOP_FRAMES = (0, 6, 7, 11, 12, 20)

# Widths of the presets' columns; 7 for all others.
WIDTHS = {
    "action.world_vector": 3,
    "action.rotation_delta": 3,
    "action.gripper_closedness_action": 1,
    "action.future.xyz_residual": 30,
    "action.future.axis_angle_residual": 30,
    "action.future.target_close": 10,
    "action_dict.cartesian_velocity": 6,
    "action_dict.gripper_position": 1,
    "observation.cartesian_position": 6,
    "observation.gripper_position": 1,
    "observation.robot_obs": 15,
    "observation.present.xyz": 3,
    "observation.present.axis_angle": 3,
    "observation.present.sensed_close": 1,
    "observation.gripper_closed": 1,
    "observation.gripper_states": 1,
    "observation.eef_pose": 6,
}
SET_WIDTHS = {
    "nyu_franka_play_dataset_converted_externally_to_rlds": {"action": 15, "observation.state": 13},
    "ucsd_kitchen_dataset_converted_externally_to_rlds": {"action": 8, "observation.state": 21},
    "berkeley_fanuc_manipulation": {"action": 6, "observation.state": 13},
    "cmu_stretch": {"action": 8, "observation.state": 4},
    "stanford_hydra_dataset_converted_externally_to_rlds": {"observation.state": 27},
    "austin_buds_dataset_converted_externally_to_rlds": {"observation.state": 24},
    "utaustin_mutex": {"observation.state": 24},
    "berkeley_autolab_ur5": {"observation.robot_state": 15, "action.gripper_closedness_action": 0},
    "viola": {"action.gripper_closedness_action": 0},
    "nyu_rot_dataset_converted_externally_to_rlds": {"action": 8},
    **{
        f"aloha1_{task}_demos": {"action": 14, "observation.state": 14}
        for task in ("fold_shorts_20", "fold_shirt_30", "scoop_X_into_bowl_45", "put_X_into_pot_300")
    },
    **{
        f"libero_{suite}_no_noops": {"observation.state": 8}
        for suite in ("spatial", "object", "goal", "10", "4_task_suites")
    },
}
SCALARS = ("action.open_gripper", "observation.state_gripper_pose")


def preset_columns(name, columns, length=11):
    """Return seeded float32 columns for a preset; the last dimensions are gripper-like, to cover every conversion."""
    rng, out = np.random.RandomState(sum(map(ord, name))), {}
    for column in sorted(columns):
        width = SET_WIDTHS.get(name, {}).get(column, WIDTHS.get(column, 7))
        width = 0 if column in SCALARS else width
        values = rng.uniform(-1, 1, (length, max(width, 1))).astype(np.float32)
        values[:, -1] = rng.choice([-1, -0.05, 0, 0.02, 0.5, 0.97, 1], length)
        out[column] = values if width else values[:, 0]
    if "action.open_gripper" in out:
        out["action.open_gripper"] = out["action.open_gripper"] > 0.3
    return out


def images(episode, camera, shape=(32, 48)):
    """Return uint8 ``(length, height, width, 3)`` images: a gradient and a square that moves from frame to frame."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    frames = []
    for step in range(LENGTHS[episode]):
        frame = np.stack([rows * 4, columns * 4, 60 * camera + 0 * rows], axis=2) + 20 * episode
        frame[4 + 2 * step : 12 + 2 * step, 3 + 4 * step : 11 + 4 * step] = (250, 240 - 20 * camera, 20 * step)
        frames.append(frame.clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def numbers(episode, width, seed=0):
    """Return float32 ``(length, width)`` in [-1, 1]."""
    values = np.random.RandomState(100 * seed + episode).uniform(-1, 1, (LENGTHS[episode], width))
    return values.astype(np.float32)


def make_rlds(out):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    F = tfds.features
    common = {"is_first": np.bool_, "discount": F.Scalar(np.float32)}

    class BridgeOrig(tfds.core.GeneratorBasedBuilder):
        name = "bridge_orig"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            observation = {
                "image_0": F.Image(shape=(32, 48, 3), encoding_format="jpeg"),
                "image_1": F.Image(shape=(32, 48, 3), encoding_format="png"),
                "state": F.Tensor(shape=(7,), dtype=np.float32),
            }
            steps = {
                "observation": F.FeaturesDict(observation),
                "action": F.Tensor(shape=(7,), dtype=np.float32),
                "language_instruction": F.Text(),
                **common,
            }
            metadata = F.FeaturesDict({"file_path": F.Text(), "episode_id": np.int32})
            features = F.FeaturesDict({"steps": F.Dataset(steps), "episode_metadata": metadata})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "val": self._generate_examples((1, 2))}

        def _generate_examples(self, episodes=range(3)):
            for e in episodes:
                action, state = numbers(e, 7), numbers(e, 7, 1)
                action[:, 6] = np.linspace(1, 0, LENGTHS[e])
                cameras = images(e, 0), images(e, 1)
                steps = [
                    {
                        "observation": {"image_0": cameras[0][i], "image_1": cameras[1][i], "state": state[i]},
                        "action": action[i],
                        "language_instruction": TASKS[e],
                        "is_first": i == 0,
                        "discount": 1.0,
                    }
                    for i in range(LENGTHS[e])
                ]
                yield e, {"steps": steps, "episode_metadata": {"file_path": f"/data/{e}.npy", "episode_id": e}}

    class Fractal(tfds.core.GeneratorBasedBuilder):
        name = "fractal20220817_data"
        VERSION = tfds.core.Version("0.1.0")

        def _info(self):
            observation = {
                "image": F.Image(shape=(32, 48, 3), encoding_format="jpeg"),
                "natural_language_instruction": F.Text(),
                "base_pose_tool_reached": F.Tensor(shape=(7,), dtype=np.float32, encoding="zlib"),
                "gripper_closed": F.Tensor(shape=(1,), dtype=np.float32),
                "height": F.Scalar(np.float64),
                "counts": F.Tensor(shape=(2, 2), dtype=np.int64),
            }
            action = {
                "world_vector": F.Tensor(shape=(3,), dtype=np.float32),
                "rotation_delta": F.Tensor(shape=(3,), dtype=np.float32),
                "gripper_closedness_action": F.Tensor(shape=(1,), dtype=np.float32),
            }
            steps = {"observation": F.FeaturesDict(observation), "action": F.FeaturesDict(action), **common}
            return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict({"steps": F.Dataset(steps)}))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for e in range(3):
                columns = preset_columns(
                    f"fractal{e}",
                    [
                        "action.world_vector",
                        "action.rotation_delta",
                        "action.gripper_closedness_action",
                        "observation.base_pose_tool_reached",
                        "observation.gripper_closed",
                    ],
                    LENGTHS[e],
                )
                camera = images(e, 0)
                steps = [
                    {
                        "observation": {
                            "image": camera[i],
                            "natural_language_instruction": TASKS[e],
                            "base_pose_tool_reached": columns["observation.base_pose_tool_reached"][i],
                            "gripper_closed": columns["observation.gripper_closed"][i],
                            "height": 0.25 * i,
                            "counts": np.array([[i, -i], [300 * i, 2**40]]),
                        },
                        "action": {k.split(".")[1]: columns[k][i] for k in columns if k.startswith("action")},
                        "is_first": i == 0,
                        "discount": 1.0,
                    }
                    for i in range(LENGTHS[e])
                ]
                yield e, {"steps": steps}

    for builder_class, camera in ((BridgeOrig, "image_0"), (Fractal, "image")):
        builder = builder_class(data_dir=str(out))
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
        encoded = {"steps": {"observation": {camera: tfds.decode.SkipDecoding()}}}
        options = {"split": "train", "shuffle_files": False}
        read, name = {}, f"observation.{camera}"
        for number, (episode, bare) in enumerate(
            zip(builder.as_dataset(**options), builder.as_dataset(**options, decoders=encoded))
        ):
            steps = [flat(step) for step in tfds.as_numpy(episode["steps"])]
            for key in steps[0]:
                read[f"{number}.{key}"] = np.stack([step[key] for step in steps])
            # tfds decodes JPEG with the fast inverse transform: store one such frame, and all accurate ones.
            read[f"fast.{number}"] = read[f"{number}.{name}"][0]
            jpegs = [flat(step)[name] for step in tfds.as_numpy(bare["steps"])]
            decoded = [tf.io.decode_jpeg(jpeg, dct_method="INTEGER_ACCURATE").numpy() for jpeg in jpegs]
            read[f"{number}.{name}"] = np.stack(decoded)
        np.savez_compressed(out / f"{builder.name}.npz", **{k: as_text(value) for k, value in read.items()})


def as_text(values):
    """Return strings as an array that needs no pickle."""
    return values.astype("U") if values.dtype.kind in "OS" else values


def flat(tree, prefix=""):
    """Return nested dictionaries as one, with names joined by dots."""
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def make_droid(out, reference):
    """Write episodes with the features of DROID 1.0.1, and store what TFDS reads and what the reference makes of it.

    The features are those that TFDS prints for gs://gresearch/robotics/droid/1.0.1, whose files are named droid_101.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds

    F, size = tfds.features, (180, 320)
    cameras = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
    state = {"cartesian_position": 6, "gripper_position": 1, "joint_position": 7}
    command = {**state, "cartesian_velocity": 6, "gripper_velocity": 1, "joint_velocity": 7}
    texts = ("language_instruction", "language_instruction_2", "language_instruction_3")

    def vectors(widths):
        return {name: F.Tensor(shape=(width,), dtype=np.float64) for name, width in widths.items()}

    class Droid(tfds.core.GeneratorBasedBuilder):
        name = "droid_101"
        VERSION = tfds.core.Version("1.0.1")

        def _info(self):
            images_of = {name: F.Image(shape=(*size, 3), encoding_format="jpeg") for name in cameras}
            steps = {
                "action": F.Tensor(shape=(7,), dtype=np.float64),
                "action_dict": F.FeaturesDict(vectors(command)),
                "observation": F.FeaturesDict({**images_of, **vectors(state)}),
                "discount": F.Scalar(np.float32),
                "reward": F.Scalar(np.float32),
                **dict.fromkeys(("is_first", "is_last", "is_terminal"), np.bool_),
                **{name: F.Text() for name in texts},
            }
            metadata = F.FeaturesDict({"file_path": F.Text(), "recording_folderpath": F.Text()})
            features = F.FeaturesDict({"steps": F.Dataset(steps), "episode_metadata": metadata})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for e, length in enumerate(LENGTHS):
                random = np.random.RandomState(e)
                # More digits than float32 has, which TFRecord files store.
                values = {name: random.uniform(-1, 1, (length, width)) for name, width in command.items()}
                seen = {name: random.uniform(-1, 1, (length, width)) for name, width in state.items()}
                values["gripper_position"] = random.uniform(0, 1, (length, 1))  # 0 open, 1 closed
                frames = {name: images(e, camera, size) for camera, name in enumerate(cameras)}
                said = ((TASKS[e], "once more", "again"), ("", TASKS[e], ""), ("", "", ""))[e]  # the last is unlabelled
                steps = [
                    {
                        "action": np.append(values["joint_velocity"][i, :6], values["gripper_position"][i]),
                        "action_dict": {name: column[i] for name, column in values.items()},
                        "observation": {name: column[i] for name, column in {**seen, **frames}.items()},
                        "discount": 1.0,
                        "reward": float(i == length - 1),
                        "is_first": i == 0,
                        "is_last": i == length - 1,
                        "is_terminal": i == length - 1,
                        **dict(zip(texts, said)),
                    }
                    for i in range(length)
                ]
                metadata = {"file_path": f"success/{e}/trajectory.h5", "recording_folderpath": f"success/{e}/MP4"}
                yield e, {"steps": steps, "episode_metadata": metadata}

    transforms, configs = import_reference(reference)
    shutil.rmtree(out / "droid", ignore_errors=True)
    builder = Droid(data_dir=str(out))
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    encoded = {"steps": {"observation": dict.fromkeys(cameras, tfds.decode.SkipDecoding())}}
    read = {}
    for number, episode in enumerate(builder.as_dataset(split="train", shuffle_files=False, decoders=encoded)):
        steps = [flat(step) for step in tfds.as_numpy(episode["steps"])]
        columns = {key: np.stack([step[key] for step in steps]) for key in steps[0]}
        trajectory = {"observation": {}, "action_dict": {}}
        for key, values in columns.items():
            group, _, name = key.rpartition(".")
            (trajectory[group] if group else trajectory)[name] = tf.constant(values)
        done = transforms["droid"](trajectory)
        (proprio,) = configs["droid"]["state_obs_keys"]
        read[f"{number}.reference.action"] = tf.cast(done["action"], tf.float32).numpy()
        read[f"{number}.reference.proprio"] = tf.cast(done["observation"][proprio], tf.float32).numpy()
        for camera in cameras:
            jpegs = columns.pop(f"observation.{camera}")[[0, -1]]  # of the first and the last step
            decoded = [tf.io.decode_jpeg(jpeg, dct_method="INTEGER_ACCURATE").numpy() for jpeg in jpegs]
            columns[f"observation.{camera}"] = np.stack(decoded)
        read |= {f"{number}.{key}": as_text(values) for key, values in columns.items()}
    np.savez_compressed(out / "droid.npz", **read)
    (out / "droid_101").rename(out / "droid")  # as on Google Cloud Storage


def import_reference(reference):
    """Return the transforms and configurations of datasets of a checkout of openvla-oft, without most it imports."""
    stubs = {"dlimp": types.ModuleType("dlimp"), "prismatic": types.ModuleType("prismatic")}
    stubs["dlimp"].DLataset = object
    for name in ("tensorflow_graphics", "tensorflow_graphics.geometry", "tensorflow_graphics.geometry.transformation"):
        stubs[name] = types.ModuleType(name)
    stubs["tensorflow_graphics.geometry"].transformation = stubs["tensorflow_graphics.geometry.transformation"]
    for name in ("vla", "vla.datasets", "vla.datasets.rlds", "vla.datasets.rlds.oxe"):
        stubs[f"prismatic.{name}"] = types.ModuleType(name)
        stubs[f"prismatic.{name}"].__path__ = [str(Path(reference) / "prismatic" / name.replace(".", "/"))]
    stubs["prismatic"].__path__ = [str(Path(reference) / "prismatic")]
    overwatch = types.ModuleType("overwatch")
    overwatch.initialize_overwatch = lambda name: None
    stubs["prismatic.overwatch"] = overwatch
    sys.modules.update(stubs)
    from prismatic.vla.datasets.rlds.oxe.configs import OXE_DATASET_CONFIGS
    from prismatic.vla.datasets.rlds.oxe.transforms import OXE_STANDARDIZATION_TRANSFORMS

    return OXE_STANDARDIZATION_TRANSFORMS, OXE_DATASET_CONFIGS


def make_presets(out, reference):
    """Store the result of the reference's standardisation and state encoding of ``preset_columns``."""
    import tensorflow as tf

    transforms, configs = import_reference(reference)
    # The package without its __init__, which needs torch.
    sys.modules["openvla"] = types.ModuleType("openvla")
    sys.modules["openvla"].__path__ = [str(Path(__file__).resolve().parents[1])]
    from openvla.data.presets import PRESETS

    result = {}
    for name in sorted(set(PRESETS) & set(transforms)):
        columns = preset_columns(name, PRESETS[name].numeric_columns())
        length = len(next(iter(columns.values())))
        trajectory = {"observation": {}, "action": {}, "language_instruction": tf.fill([length], "x")}
        for column, values in columns.items():
            group, _, key = column.partition(".")
            if name == "kuka" and group == "observation":
                values = np.array([zlib.compress(row.tobytes()) for row in values], dtype=object)
            if group == "action" and not key:
                trajectory["action"] = tf.constant(values)
            elif not key:
                raise ValueError(column)
            else:
                key = PATHS.get(key, key)
                trajectory.setdefault(group, {})[key] = tf.constant(values)
        named = ("image_with_depth", "natural_language_instruction", "exterior_image_1_left", "exterior_image_2_left")
        for key in named:
            trajectory["observation"].setdefault(key, tf.fill([length], "x"))
        for key in ("depth", "depth_additional_view"):
            trajectory["observation"].setdefault(key, tf.zeros([length, 2, 2, 1]))
        done = transforms[name](trajectory)
        result[f"{name}.action"] = tf.cast(done["action"], tf.float32).numpy()
        steps = len(result[f"{name}.action"])
        observation = done["observation"]
        observation.setdefault("EEF_state", observation.get("eef_state"))  # openvla-oft misspells cmu_stretch's
        keys = configs[name]["state_obs_keys"]
        parts = [tf.zeros((steps, 1)) if key is None else tf.cast(observation[key], tf.float32) for key in keys]
        result[f"{name}.proprio"] = tf.concat(parts, axis=1).numpy()
    from prismatic.vla.datasets.rlds.traj_transforms import chunk_act_obs

    trajectory = {
        "action": tf.constant(numbers(2, 7)),
        "observation": {"step": tf.range(LENGTHS[2])},
        "task": {"language_instruction": tf.fill([LENGTHS[2]], "x")},
        "dataset_name": tf.fill([LENGTHS[2]], "x"),
        "absolute_action_mask": tf.tile([[False] * 6 + [True]], [LENGTHS[2], 1]),
    }
    chunked = chunk_act_obs(trajectory, window_size=1, future_action_window_size=CHUNK - 1)
    result["chunks.actions"] = chunked["action"].numpy()
    result["chunks.steps"] = chunked["observation"]["step"].numpy()[:, 0]
    np.savez_compressed(out / "presets.npz", **result)


# Column names with slashes, by the presets' names with dots.
PATHS = {
    "clip_function_input.base_pose_tool_reached": "clip_function_input/base_pose_tool_reached",
    "future.xyz_residual": "future/xyz_residual",
    "future.axis_angle_residual": "future/axis_angle_residual",
    "future.target_close": "future/target_close",
    "present.xyz": "present/xyz",
    "present.axis_angle": "present/axis_angle",
    "present.sensed_close": "present/sensed_close",
}


def make_lerobot(out):
    try:
        from ledataset.datasets.lerobot_dataset import LeRobotDataset

        name = "lerobot_v3"
    except ImportError:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset

        name = "lerobot_v21"
    import av

    features = {
        "action": {"dtype": "float32", "shape": (7,), "names": None},
        "observation.state": {"dtype": "float32", "shape": (8,), "names": None},
        "observation.images.top": {"dtype": "video", "shape": (64, 96, 3), "names": ["height", "width", "channels"]},
        "observation.images.wrist": {"dtype": "image", "shape": (32, 48, 3), "names": ["height", "width", "channels"]},
    }
    dataset = LeRobotDataset.create(
        repo_id=f"test/{name}", fps=FPS, features=features, root=out / name, use_videos=True
    )
    for e, length in enumerate(LENGTHS):
        frames, wrist = images(e, 0, (64, 96)), images(e, 1)
        for i in range(length):
            row = {
                "action": numbers(e, 7)[i],
                "observation.state": numbers(e, 8, 1)[i],
                "observation.images.top": frames[i],
                "observation.images.wrist": wrist[i],
            }
            if name == "lerobot_v3":
                dataset.add_frame({**row, "task": TASKS[e]})
            else:
                dataset.add_frame(row, task=TASKS[e])
        dataset.save_episode()
    if name == "lerobot_v3":
        dataset.finalize()
    dataset = LeRobotDataset(f"test/{name}", root=out / name)
    rows = [dataset.hf_dataset[i] for i in range(len(dataset.hf_dataset))]
    read = {column: np.stack([np.asarray(row[column]) for row in rows]) for column in ("action", "observation.state")}
    wrist = np.stack([np.asarray(row["observation.images.wrist"]) for row in rows])  # float32 (3, height, width)
    read["wrist"] = np.round(wrist * 255).astype(np.uint8)
    read["episode"] = np.array([int(row["episode_index"]) for row in rows])
    # The library's video readers do not load with this torch; decode with FFmpeg from start to end instead.
    frames = []
    for file in sorted((out / name / "videos").rglob("*.mp4")):
        with av.open(str(file)) as container:
            frames += [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    read["top"] = np.stack(frames)[list(TOP_FRAMES)]
    np.savez_compressed(out / f"{name}.npz", **read)
    shutil.rmtree(out / name / "images", ignore_errors=True)  # left over by v2.1, not part of the format
    for file in ("stats.json", "episodes_stats.jsonl"):  # LeRobot's statistics are large and not read
        (out / name / "meta" / file).unlink(missing_ok=True)


def make_lerobot_files(out):
    """Merge datasets of one episode with LeRobot's own tool, into one file each and chunks of two files."""
    import tempfile

    from lerobot.datasets.aggregate import aggregate_datasets
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    cameras, name = {"top": (64, 96), "side": (48, 64)}, "lerobot_v3_files"
    features = {"action": {"dtype": "float32", "shape": (7,), "names": None}}
    for camera, size in cameras.items():
        shape = {"shape": (*size, 3), "names": ["height", "width", "channels"]}
        features[f"observation.images.{camera}"] = {"dtype": "video", **shape}
    with tempfile.TemporaryDirectory() as folder:
        roots = [Path(folder, str(e)) for e in range(len(LENGTHS))]
        for e, root in enumerate(roots):
            dataset = LeRobotDataset.create(repo_id=f"test/{e}", fps=FPS, features=features, root=root)
            frames = {camera: images(e, number, size) for number, (camera, size) in enumerate(cameras.items())}
            for i in range(LENGTHS[e]):
                row = {f"observation.images.{camera}": frames[camera][i] for camera in cameras}
                dataset.add_frame({**row, "action": numbers(e, 7)[i], "task": TASKS[e]})
            dataset.save_episode()
            dataset.finalize()
        shutil.rmtree(out / name, ignore_errors=True)
        aggregate_datasets(
            [f"test/{e}" for e in range(len(roots))],
            f"test/{name}",
            roots,
            out / name,
            chunk_size=2,
            concatenate_videos=False,
            concatenate_data=False,
        )
    dataset = LeRobotDataset(f"test/{name}", root=out / name, video_backend="pyav", return_uint8=True)
    rows = [dataset[i] for i in range(len(dataset))]
    read = {"action": np.stack([np.asarray(row["action"]) for row in rows])}
    for camera in cameras:
        frames = np.stack([np.asarray(rows[i][f"observation.images.{camera}"]) for i in TOP_FRAMES])
        read[camera] = frames.transpose(0, 2, 3, 1)
    read["task"] = np.array([row["task"] for row in rows])
    np.savez_compressed(out / f"{name}.npz", **read)
    (out / name / "meta" / "stats.json").unlink(missing_ok=True)


def make_hdf5(out):
    import h5py

    (out / "hdf5").mkdir(exist_ok=True)
    for e in range(2):
        info = json.dumps({"language_instruction": TASKS[e]}) if e == 0 else None
        stem = "pick_up_the_red_block" if e == 0 else "KITCHEN_SCENE3_open_the_drawer"
        with h5py.File(out / "hdf5" / f"{stem}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            if info:
                data.attrs["problem_info"] = info
            for demo in (0, 2, 10)[: 3 - 2 * e]:
                number = (0, 2, 10).index(demo)
                group = data.create_group(f"demo_{demo}")
                actions = numbers(number, 7, 5 + e).astype(np.float64)
                actions[:, 6] = np.sign(actions[:, 6])
                group.create_dataset("actions", data=actions)
                group.create_dataset("states", data=numbers(number, 12, 7).astype(np.float64))
                obs = group.create_group("obs")
                obs.create_dataset("ee_states", data=numbers(number, 6, 8).astype(np.float64))
                obs.create_dataset("gripper_states", data=numbers(number, 2, 9).astype(np.float64))
                packed = {"compression": "gzip", "compression_opts": 9, "chunks": (LENGTHS[number], 32, 48, 3)}
                obs.create_dataset("agentview_rgb", data=images(number, 0), **packed)
                obs.create_dataset("eye_in_hand_rgb", data=images(number, 1), **packed)


def make_zarr(out):
    """Write buffers in the layouts of Diffusion Policy's pusht_cchi_v7_replay.zarr and of UMI's dataset.zarr.zip."""
    import zarr
    from imagecodecs.numcodecs import Jpegxl, register_codecs
    from numcodecs import Blosc

    register_codecs()
    steps = range(len(LENGTHS))
    arrays = {
        "replay_buffer.zarr": {
            "img": np.concatenate([images(e, 0) for e in steps]).astype(np.float32),
            "state": np.concatenate([numbers(e, 5, 1) for e in steps]),
            "action": np.concatenate([numbers(e, 7) for e in steps]),
        },
        "umi.zarr.zip": {
            "camera0_rgb": np.concatenate([images(e, 0) for e in steps]),
            "robot0_eef_pos": np.concatenate([numbers(e, 3) for e in steps]),
            "robot0_eef_rot_axis_angle": np.concatenate([numbers(e, 3, 1) for e in steps]),
            "robot0_gripper_width": np.concatenate([numbers(e, 1, 2) for e in steps]),
            "robot0_demo_start_pose": np.concatenate([numbers(e, 6, 3) for e in steps]).astype(np.float64),
            "robot0_demo_end_pose": np.concatenate([numbers(e, 6, 4) for e in steps]).astype(np.float64),
        },
    }
    for name, columns in arrays.items():
        is_zip = name.endswith(".zip")
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).unlink(missing_ok=True)
        store = zarr.ZipStore(str(out / name), mode="w") if is_zip else zarr.DirectoryStore(str(out / name))
        root = zarr.group(store)
        for key, values in columns.items():
            if is_zip and key == "camera0_rgb":
                options = {"chunks": (1, *values.shape[1:]), "compressor": Jpegxl(level=99, numthreads=1)}
            else:  # as ReplayBuffer.get_optimal_chunks and resolve_compressor do
                options = {"chunks": (8, *values.shape[1:]), "compressor": Blosc("lz4", 5, Blosc.NOSHUFFLE)}
            root.require_group("data").create_dataset(key, data=values, **options)
        ends = np.cumsum(LENGTHS)
        root.require_group("meta").create_dataset("episode_ends", data=ends, chunks=ends.shape, compressor=None)
        read = {key: root["data"][key][:] for key in columns}
        store.close() if is_zip else None
        frames = next(key for key, values in read.items() if values.ndim == 4)
        read[frames] = read[frames][list(TOP_FRAMES)].astype(np.uint8)
        np.savez_compressed(out / f"{name.partition('.')[0]}.npz", **read)


def make_episode(out, demos):
    """Store ten steps of a scripted episode whose initial state is not in the training data."""
    import pyarrow.parquet

    file = min(demos.glob("data/*/*.parquet"))
    rows = pyarrow.parquet.read_table(file, filters=[("episode_index", "=", 0)]).to_pylist()
    steps = [rows[index] for index in np.linspace(0, len(rows) - 1, 10).round().astype(int)]
    (out / "libero_episode").mkdir(exist_ok=True)
    for number, step in enumerate(steps):
        (out / "libero_episode" / f"{number}.jpg").write_bytes(step["observation.image"]["bytes"])
    fields = ("frame_index", "language_instruction", "observation.state", "action")
    stored = [{name: step[name] for name in fields} for step in steps]
    (out / "libero_episode" / "steps.json").write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "part", choices=("rlds", "droid", "presets", "lerobot", "lerobot_files", "hdf5", "zarr", "episode")
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--reference", type=Path, help="a checkout of openvla-oft; for episode, a LeRobot dataset")
    args = parser.parse_args()
    extra = (args.reference,) if args.part in ("droid", "presets", "episode") else ()
    globals()[f"make_{args.part}"](args.out, *extra)
