"""Closed-loop evaluation in LIBERO: without the simulator, and with it (``-m libero``)."""

import dataclasses
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from minivla import TINY_VQ, set_random_vq
from openvla import PLATFORMS, Policy, load_policy
from openvla.__main__ import main
from openvla.data.episodes import decode_image
from openvla.data.open import open_dataset
from openvla.evaluation import libero, simulator
from openvla.evaluation.checks import (
    require_libero_policy,
    resolve_image_preset,
    statistics_warnings,
    weights_digest,
)
from openvla.evaluation.harness_database import EVAL_ID, database_path, read_episodes, requeue_unfinished
from openvla.evaluation.report import draw_contact_sheet, success_rate, video_frames, wilson_interval
from openvla.inference.demo_policies import DEMO_OFT_POLICY, DEMO_POLICY
from openvla.inference.robot_conventions import convert_action
from openvla.tiny import build_tiny
from PIL import Image
from reference import REPOSITORY

pytestmark = pytest.mark.usefixtures("renderer")
# Keeps the gripper of an untrained head between 0 and 1.
STATISTICS = {"action": {"q01": [-1.0] * 6 + [0.45], "q99": [1.0] * 6 + [0.55], "min": [-1.0] * 6 + [0.0]}}
STATISTICS["proprio"] = {"q01": [-4.0] * 8, "q99": [4.0] * 8}
OFT = {**PLATFORMS["libero"], "parallel_decoding": True, "action_head": "l1", "num_images_in_input": 2}


def build_policy(**overrides):
    model, processor = build_tiny(**overrides)
    predicts_tokens = model.config.action_head is None
    return Policy(model, processor, model.resolve_unnorm_key(), constrain_actions=predicts_tokens)


# -- the interval ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(successes, trials, low, high):
    """Newcombe 1998, table I, method 3."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_rejects_impossible_counts():
    for counts in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="1 or more trials"):
            wilson_interval(*counts)


def test_success_rate_ignores_errors():
    runs = [{"success": True, "error": None}, {"success": False, "error": None}, {"success": False, "error": "broke"}]
    assert success_rate(runs)["success_rate"] == 0.5
    assert success_rate(runs[2:]) == {"evaluated": 0, "successes": 0, "success_rate": None, "success_interval": None}


# -- missing packages, policies that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("package", ["vla_eval", "mujoco"])
def test_missing_package_names_the_install_command(package, monkeypatch, capsys):
    if package == "mujoco":
        pytest.importorskip("vla_eval")
        monkeypatch.setitem(sys.modules, "libero.libero.benchmark", None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(simulator, "_can_load", lambda library: True)
    assert main(["evaluate"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("openvla evaluate: OpenVLAImportError")
    assert "pip install 'openvla[libero]'" in error


@pytest.mark.skipif(sys.platform != "linux", reason="other systems render without these libraries")
def test_missing_renderer_names_the_install_command(monkeypatch):
    monkeypatch.setattr(simulator, "RENDERERS", {"egl": "libnowhere.so.1", "osmesa": "libc.so.6"})
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(ImportError, match="libnowhere.so.1 cannot be loaded.*apt-get install -y libegl1"):
        simulator.choose_renderer()
    monkeypatch.delenv("MUJOCO_GL")
    assert simulator.choose_renderer() == "osmesa"  # the only one installed
    assert simulator.os.environ["PYOPENGL_PLATFORM"] == "osmesa"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"norm_stats": {"aloha": {"action": {"q01": [-1.0] * 14, "q99": [1.0] * 14}}}}, "7 numbers.*'aloha' have 14"),
        ({"norm_stats": {"mine": STATISTICS}, **OFT, "num_images_in_input": 3}, "takes 3 images"),
        ({"norm_stats": {"mine": {"action": {**STATISTICS["action"], "min": [-1.0] * 7}}}}, "clipped_inverted"),
    ],
)
def test_policy_of_another_robot_is_rejected(overrides, message):
    with pytest.raises(ValueError, match=message):
        require_libero_policy(build_policy(**overrides))


def test_policy_of_libero_is_accepted():
    for overrides in ({}, {"norm_stats": {"mine": STATISTICS}}, {"norm_stats": {"mine": STATISTICS}, **OFT}):
        require_libero_policy(build_policy(**overrides))


@pytest.mark.parametrize(
    ("key", "low", "high", "message"),
    [
        ("libero_object", [-0.9] * 3 + [-0.1] * 3, [0.94] * 3 + [0.3] * 3, None),
        ("mine", [-0.3, -0.05, -0.05, 0, 0, 0], [0.1, 0.05, 0.05, 0, 0, 0], None),  # slow, in one direction faster
        ("bridge_orig", [-0.03] * 3 + [-0.2] * 3, [0.03] * 3 + [0.2] * 3, "'bridge_orig' are metres and radians"),
        ("libero_object", [-0.03] * 3 + [-0.2] * 3, [0.03] * 3 + [0.2] * 3, "reach 0.03 of the controller's range"),
        ("libero_object", [-5.0] * 3 + [-0.2] * 3, [30.0, 5, 5] + [0.2] * 3, "reach 30 in dx, and .* clips at 1"),
        ("mine", [-0.9] * 3 + [-20.0] * 3, [0.9] * 3 + [10.0] * 3, "reach 20 in droll"),
    ],
)
def test_statistics_of_another_robot_give_a_warning(key, low, high, message):
    statistics = {"action": {"q01": [*low, 0.0], "q99": [*high, 1.0], "mask": [True] * 6 + [False]}}
    warnings = statistics_warnings(build_policy(norm_stats={key: statistics}))
    assert len(warnings) == (message is not None)
    assert message is None or re.search(message, warnings[0])


def test_statistics_of_the_demo_policies_give_no_warning():
    for folder in (DEMO_POLICY, DEMO_OFT_POLICY):
        assert statistics_warnings(load_policy(folder)) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"episodes": 0}, "--episodes must be 1 or more"),
        ({"workers": 0}, "--workers must be"),
        ({"max_steps": -1}, "--max-steps must be"),
        ({"first_initial_state": 40}, "initial states 0 to 49; 20 episodes from 40 on would need up to 59"),
        ({"first_initial_state": 50, "episodes": 1}, "initial states 0 to 49"),
        ({"n_action_steps": 2}, "--n-action-steps must be 1 to 1"),
    ],
)
def test_settings_out_of_range_are_rejected(changed, message):
    settings = {"episodes": 20, "first_initial_state": 30, "num_initial_states": 50, "max_steps": None, "workers": 1}
    settings |= {"n_action_steps": None, "chunk_length": build_policy().model.config.chunk_length}
    libero._validate_settings(**settings)
    with pytest.raises(ValueError, match=message):
        libero._validate_settings(**{**settings, **changed})


def test_frames_are_rotated_once():
    """The harness rotates frames; a preset that rotates them, too, would turn them upside down."""
    policy = build_policy()
    assert resolve_image_preset(policy, None) == "libero"
    policy.processor.image_preset = "libero-raw"
    assert resolve_image_preset(policy, None) == "libero"
    policy.processor.image_preset = "center-crop"
    assert resolve_image_preset(policy, None) == "center-crop"
    assert resolve_image_preset(policy, "none") == "none"


def test_weights_digest_depends_on_the_weights():
    same, other = build_policy().model, build_policy().model
    assert weights_digest(same) == weights_digest(other)
    other.language_model.lm_head.weight.data[0, 0] += 1e-3
    assert weights_digest(same) != weights_digest(other)


# -- the harness ------------------------------------------------------------------------------------------------------


def play_episodes(policy, observations, **settings):
    """Return the actions of two episodes with the same observations, over a real connection of the harness."""
    import anyio
    from openvla.evaluation.vla_eval import PolicyServer
    from vla_eval.api import serve_background
    from vla_eval.connection import Connection

    results = []

    async def play(url):
        connection = Connection(url, timeout=60)
        await connection.connect()
        episodes = []
        for _ in range(2):
            await connection.start_episode({"task": {"name": "go"}})
            episodes.append([(await connection.act(observation))["actions"] for observation in observations])
            await connection.end_episode({"metrics": {"success": True}})
        info = connection.server_info["observation_params"]
        with anyio.fail_after(60):  # the end of an episode is not acknowledged
            while len(results) < 2:
                await anyio.sleep(0.01)
        await connection.close()
        return episodes, info

    with serve_background(PolicyServer(policy, report_episode_result=results.append, **settings)) as handle:
        episodes, info = anyio.run(play, handle.url)
    assert results == [{"metrics": {"success": True}}] * 2
    return episodes, info


def random_observations(count, cameras):
    random = np.random.default_rng(0)
    return [
        {
            "images": {camera: random.integers(0, 256, (64, 64, 3), np.uint8) for camera in cameras},
            "states": random.normal(size=8),
            "task_description": "pick up the milk",
        }
        for _ in range(count)
    ]


def test_single_actions_through_the_harness():
    pytest.importorskip("openvla.evaluation.vla_eval", reason="needs vla-eval", exc_type=ImportError)
    policy, frames = build_policy(norm_stats={"mine": STATISTICS}), random_observations(2, ["agentview"])
    (first, second), info = play_episodes(policy, frames)
    expected = [convert_action(policy.act(o["images"]["agentview"], o["task_description"]), "libero") for o in frames]
    np.testing.assert_array_equal(first, np.float32(expected))
    np.testing.assert_array_equal(second, np.float32(expected))
    assert (info["send_wrist_image"], info["send_state"], info["quat_no_antipodal"]) == (False, False, True)


@pytest.mark.parametrize("n_action_steps", [None, 2])
def test_chunks_are_queued_and_dropped_at_the_end_of_an_episode(n_action_steps):
    pytest.importorskip("openvla.evaluation.vla_eval", reason="needs vla-eval", exc_type=ImportError)
    policy = build_policy(norm_stats={"mine": STATISTICS}, **{**OFT, "chunk_length": 3})
    frames = random_observations(4, ["agentview", "wrist"])
    (first, second), info = play_episodes(policy, frames, n_action_steps=n_action_steps)
    expected = []
    for start in range(0, 4, n_action_steps or 3):
        o = frames[start]
        chunk = policy.act([o["images"]["agentview"], o["images"]["wrist"]], o["task_description"], o["states"])
        expected += list(convert_action(chunk[: n_action_steps or 3], "libero"))
    np.testing.assert_array_equal(first, np.float32(expected[:4]))
    np.testing.assert_array_equal(second, np.float32(expected[:4]))
    assert (info["send_wrist_image"], info["send_state"]) == (True, True)


MINIVLA = {**TINY_VQ, "chunk_length": 3, "image_sequence_len": 4, "use_wrist_image": True}


@pytest.mark.parametrize("fields", [MINIVLA, {"image_sequence_len": 4, "use_wrist_image": True}], ids=["vq", "bins"])
def test_images_of_two_moments_are_those_of_the_episode(fields):
    """Also where an action of a queued chunk is taken, and from the first moment of every episode."""
    pytest.importorskip("openvla.evaluation.vla_eval", reason="needs vla-eval", exc_type=ImportError)
    policy, frames = build_policy(**{**fields, "norm_stats": {"mine": STATISTICS}}), random_observations(4, CAMERAS)
    if policy.model.config.action_vq:
        set_random_vq(policy.model)
    (first, second), info = play_episodes(policy, frames)
    expected = []
    for step in range(0, 4, policy.model.config.chunk_length):
        moments = [frames[max(step - 1, 0)], frames[step]]
        images = [moment["images"][camera] for moment in moments for camera in CAMERAS]
        actions = np.atleast_2d(policy.act(images, frames[step]["task_description"]))
        actions[:, -1] = actions[:, -1].clip(0, 1)
        expected += list(convert_action(actions, "libero"))
    np.testing.assert_array_equal(first, np.float32(expected[:4]))
    np.testing.assert_array_equal(second, np.float32(expected[:4]))
    assert (info["send_wrist_image"], info["send_state"]) == (True, False)


CAMERAS = ["agentview", "wrist"]


def test_the_first_action_of_every_chunk_is_executed():
    pytest.importorskip("openvla.evaluation.vla_eval", reason="needs vla-eval", exc_type=ImportError)
    policy, frames = build_policy(**{**MINIVLA, "norm_stats": {"mine": STATISTICS}}), random_observations(3, CAMERAS)
    set_random_vq(policy.model)
    policy.actions = "first"
    (first, _), _ = play_episodes(policy, frames)
    expected = []
    for o in frames:
        action = policy.act([o["images"][camera] for camera in CAMERAS], o["task_description"])
        action[-1] = action[-1].clip(0, 1)
        expected.append(convert_action(action, "libero"))
    np.testing.assert_array_equal(first, np.float32(expected))


def test_minivla_s_frames_are_rendered_and_prepared_as_its_own_evaluation_does():
    policy = build_policy(prompt_style="openvla-mini")
    assert resolve_image_preset(policy, None) == "minivla-libero"
    policy.processor.image_preset = "minivla-libero-raw"
    assert resolve_image_preset(policy, None) == "minivla-libero"
    assert libero.CAMERAS_OF_PRESETS["minivla-libero"] == {"camera_size": 224}
    harness = pytest.importorskip("openvla.evaluation.vla_eval", reason="needs vla-eval", exc_type=ImportError)
    assert harness.LiberoSuite("libero_object", [0], camera_size=224).camera_size == 224


@pytest.mark.parametrize("sign", [1, -1])
def test_proprio_rotation_is_not_wrapped_at_pi(sign):
    """For both quaternions of a rotation: the demonstrations have robosuite's axis-angle with angles up to 2 pi."""
    harness = pytest.importorskip("openvla.evaluation.vla_eval", reason="needs vla-eval", exc_type=ImportError)
    angle = sign * 0.8 * np.pi
    quaternion = sign * np.array([0.6 * np.sin(angle / 2), 0.8 * np.sin(angle / 2), 0, np.cos(angle / 2)])
    observation = {
        "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
        "robot0_eef_quat": quaternion,
        "robot0_gripper_qpos": np.array([0.04, -0.04]),
        "agentview_image": np.zeros((256, 256, 3), np.uint8),
    }
    turned = 0.8 * np.pi if sign == 1 else 1.2 * np.pi
    expected = [0.1, 0.2, 0.3, 0.6 * turned, 0.8 * turned, 0, 0.04, -0.04]
    np.testing.assert_allclose(simulator.end_effector_state(observation), expected, rtol=1e-12)
    server = harness.PolicyServer(build_policy(norm_stats={"mine": STATISTICS}, **OFT))
    suite = harness.LiberoSuite("libero_object", [0], **server.get_observation_params())
    controller = SimpleNamespace(ee_pos=np.zeros(3), ee_ori_mat=np.eye(3))
    suite._env = SimpleNamespace(robots=[SimpleNamespace(controller=controller)])
    observation["robot0_eye_in_hand_image"] = observation["agentview_image"]
    np.testing.assert_allclose(suite.make_obs(observation, {"name": "go"})["states"], expected, rtol=1e-6)


def test_interrupted_and_failed_episodes_are_requeued(tmp_path):
    """In the harness's database, claimed episodes and errors are queued again, other episodes are kept."""
    recording = pytest.importorskip("vla_eval.recording")
    tasks, episodes = [4, 7], 3
    entry = f"{EVAL_ID}-{EVAL_ID}"
    store = recording.RecordingStore(database_path(tmp_path))
    store.seed_queue(entry, [0] * episodes + [1] * episodes)

    def result(item, status, run):
        task, number = divmod(item, episodes)
        detail = "Traceback:\nOSError: broke\n" if status == "error" else None
        store.upsert_episode_result(
            sid=run, eid=str(item), eval_id=entry, task_name="t", episode_id=number, status=status, metrics={},
            steps=5, elapsed_sec=1.0, context={"task_idx": task, "task_id": tasks[task]},
            jsonl_path=f"episodes/{item}.jsonl", failure_reason=None, failure_detail=detail,
        )  # fmt: skip
        store.finish(entry, item)

    for _ in range(5):
        store.claim(entry, 1, None, 2)
    for item, status, run in [
        (0, "success", "a"),
        (1, "error", "a"),
        (3, "error", "a"),
        (3, "fail", "b"),
        (4, "error", "a"),
    ]:
        result(item, status, run)
    store.close()
    assert requeue_unfinished(tmp_path) == 2  # 0, and 3 whose second attempt ran; 2 and 5 were never done
    store = recording.RecordingStore(database_path(tmp_path))
    left = []
    while (item := store.claim(entry, 0, None, 1)) is not None:
        left.append(item)
        result(item, "success", "c")
    assert sorted(left) == [1, 2, 4, 5]
    store.close()
    runs = read_episodes(tmp_path, tasks, first_initial_state=30)
    assert [(run["task"], run["initial_state"], run["success"]) for run in runs] == [
        (4, 30, True), (4, 31, True), (4, 32, True), (7, 30, False), (7, 31, True), (7, 32, True),
    ]  # fmt: skip
    assert not any(run["error"] for run in runs)


def test_episode_without_an_action_is_a_failure(tmp_path):
    recording = pytest.importorskip("vla_eval.recording")
    entry = f"{EVAL_ID}-{EVAL_ID}"
    store = recording.RecordingStore(database_path(tmp_path))
    store.seed_queue(entry, [0, 0])
    message = "RuntimeError: Server error: {'error': 'observation_failed: NoActionError: The model ended early'}"
    for number, detail in enumerate([message, None]):
        store.claim(entry, 1, None, 2)
        store.upsert_episode_result(
            sid="a", eid=str(number), eval_id=entry, task_name="t", episode_id=number,
            status="error" if detail else "success", metrics={}, steps=5, elapsed_sec=1.0,
            context={"task_idx": 0, "task_id": 4}, jsonl_path=f"episodes/{number}.jsonl", failure_reason=None,
            failure_detail=detail and f"Traceback:\n{detail}\n",
        )  # fmt: skip
        store.finish(entry, number)
    store.close()
    assert requeue_unfinished(tmp_path) == 2  # a failure is a result, so it is not run again
    runs = read_episodes(tmp_path, [4], first_initial_state=0)
    assert [(run["success"], run["error"], run["no_action"]) for run in runs] == [
        (False, None, message),
        (True, None, None),
    ]
    assert success_rate(runs)["success_rate"] == 0.5


def test_output_of_another_evaluation_is_rejected(tmp_path):
    settings = libero.EvaluationSettings(
        model="a",
        weights_digest="0123",
        unnorm_key="mine",
        image_preset="libero",
        constrain_actions=False,
        actions="all",
        history_padding="start",
        suite="libero_object",
        instruction_source="file name",
        tasks=[0],
        episodes=5,
        first_initial_state=0,
        max_steps=None,
        n_action_steps=None,
        seed=0,
    )
    libero._prepare_output(tmp_path, dataclasses.replace(settings, episodes=7))  # nothing ran yet
    libero._prepare_output(tmp_path, settings)
    database_path(tmp_path).touch()
    libero._prepare_output(tmp_path, settings)
    with pytest.raises(ValueError, match=r"another evaluation \(model 'a' -> 'b'\)"):
        libero._prepare_output(tmp_path, dataclasses.replace(settings, model="b"))
    # Without the field, instructions were the file names: plain suites continue, perturbed ones do not.
    file = tmp_path / "settings.json"
    stored = json.loads(file.read_text())
    del stored["instruction_source"], stored["actions"], stored["history_padding"]  # of an earlier version
    file.write_text(json.dumps(stored))
    libero._prepare_output(tmp_path, settings)
    with pytest.raises(ValueError, match=r"another evaluation \(instruction_source 'file name' -> 'BDDL'\)"):
        libero._prepare_output(tmp_path, dataclasses.replace(settings, instruction_source="BDDL"))
    with pytest.raises(ValueError, match=r"another evaluation \(actions 'all' -> 'first'\)"):
        libero._prepare_output(tmp_path, dataclasses.replace(settings, actions="first"))


def test_contact_sheet_shows_every_episode(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "one.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.width = stream.height = 64
        for level in range(0, 250, 10):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    run = {"initial_state": 30, "success": True, "steps": 24, "video": "one.mp4", "error": None}
    failed = {**run, "success": False, "video": "none.mp4"}
    draw_contact_sheet(
        tmp_path, [{"instruction": "go", "runs": [run, failed]}], tmp_path / "sheet.png", columns=3, size=50
    )
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet).astype(int)
    assert pixels.shape == (2 * 68, 6 + 3 * 50, 3)
    levels = [pixels[43, 31 + 50 * column, 0] for column in range(3)]
    assert levels == pytest.approx([0, 120, 240], abs=6)
    assert pixels[40, 1].tolist() == [0, 128, 0]
    assert pixels[108, 1].tolist() == [255, 0, 0]


# -- with the simulator: python -m pytest -m libero -------------------------------------------------------------------


@pytest.mark.libero
def test_demo_policy_is_evaluated(tmp_path, capsys):
    output = tmp_path / "evaluation"
    arguments = ["evaluate", "--tasks", "alphabet", "--episodes", "2", "--first-initial-state", "30"]
    arguments += ["--max-steps", "4", "--workers", "2", "--output", str(output), "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((output / "results.json").read_text())
    assert report["complete"]
    assert (report["evaluated"], report["successes"], report["success_interval"][0]) == (2, 0, 0)
    (task,) = report["results"]
    assert task["instruction"] == "pick up the alphabet soup and place it in the basket"
    assert [(run["initial_state"], run["steps"]) for run in task["runs"]] == [(30, 4), (31, 4)]
    frames = [video_frames(output / run["video"], 8) for run in task["runs"]]
    assert [len(video) for video in frames] == [5, 5]  # the first observation, and one after every step
    assert np.abs(frames[0][0].astype(int) - frames[1][0]).max() > 50  # other initial states
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.size[0] > 1000
    # The same command changes nothing; a command with other settings is rejected.
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == report
    assert main([*arguments, "--seed", "1"]) == 2
    assert "another evaluation (seed 0 -> 1)" in capsys.readouterr().err


@pytest.mark.libero
def test_killed_evaluation_continues(tmp_path):
    command = [sys.executable, "-m", "openvla", "evaluate", "--tasks", "0", "--episodes", "2", "--max-steps", "3"]
    command += ["--output", str(tmp_path), "--json"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 500
    while not list((tmp_path / "episodes").glob("task*.mp4")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    (first,) = (tmp_path / "episodes").glob("task*.mp4")
    modified = first.stat().st_mtime_ns
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(completed.stdout)
    assert (report["complete"], report["evaluated"]) == (True, 2)
    assert first.stat().st_mtime_ns == modified
    assert not list((tmp_path / "episodes").glob(".recorder-*"))


@pytest.mark.libero
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "libero_objects"], "Unknown suite 'libero_objects'. Did you mean 'libero_object'"),
        (["--tasks", "mustard"], "Unknown task 'mustard'"),
        (["--first-initial-state", "45"], "initial states 0 to 49"),
    ],
)
def test_unknown_suite_task_or_state_is_an_error(arguments, message, tmp_path, capsys):
    assert main(["evaluate", *arguments, "--episodes", "6", "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.libero
def test_replayed_demonstration_succeeds(tmp_path):
    """Collector, dataset writer, preset, gripper, harness and simulator agree."""
    script = REPOSITORY / "examples" / "collect_libero.py"
    as_jpeg = runpy.run_path(str(script), run_name="collector")["as_jpeg"]
    folder = tmp_path / "libero_object_no_noops"
    arguments = [folder, "--tasks", "0", "--episodes", "1", "--initial-states", "30", "31", "--undisturbed"]
    subprocess.run([sys.executable, script, *arguments], check=True)
    episode = open_dataset(folder)[0]
    assert set(episode.actions[:, -1]) == {0, 1}
    assert episode.actions[0, -1] == 1  # open: OpenVLA's convention
    inputs = []

    class Replay(Policy):
        def act(self, image, instruction, proprio=None):
            inputs.append((np.asarray(image[0]), np.asarray(image[1]), np.asarray(proprio), instruction))
            return episode.actions[len(inputs) - 1]

    statistics = {"mine": STATISTICS}
    model, processor = build_tiny(norm_stats=statistics, **{**OFT, "chunk_length": 1})
    report = libero.evaluate_libero(
        Replay(model, processor, "mine"),
        tasks=[0],
        episodes=1,
        first_initial_state=30,
        max_steps=len(episode),
        output=tmp_path / "evaluation",
        progress=False,
    )
    assert (report["successes"], report["results"][0]["runs"][0]["steps"]) == (1, len(episode))
    assert {instruction for *_, instruction in inputs} == {episode.instructions[0]}
    for step in range(0, len(episode), 20):  # the frames of the evaluation equal the stored ones in every byte
        for frame, stored in zip(inputs[step], episode.images(step)):
            upside_down = frame[::-1, ::-1]
            np.testing.assert_array_equal(decode_image(as_jpeg(upside_down)), stored)
    np.testing.assert_allclose([state for _, _, state, _ in inputs], episode.proprio, atol=1e-5)
