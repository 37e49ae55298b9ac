"""The model server for vla-eval (integrations/vla_eval), over real connections of the harness."""

import importlib.util

import numpy as np
import pytest
from openvla import PLATFORMS, Policy, load_policy
from openvla.inference.robot_conventions import convert_action
from openvla.tiny import build_tiny
from reference import REPOSITORY

pytest.importorskip("vla_eval")
STATISTICS = {
    "action": {"q01": [-1.0] * 6 + [0.45], "q99": [1.0] * 6 + [0.55]},
    "proprio": {"q01": [-4.0] * 8, "q99": [4.0] * 8},
}
OFT = {**PLATFORMS["libero"], "parallel_decoding": True, "action_head": "l1", "num_images_in_input": 2}
INSTRUCTION = "pick up the milk"


@pytest.fixture(scope="module")
def script():
    """The module of the model server."""
    path = REPOSITORY / "integrations" / "vla_eval" / "openvla_server.py"
    spec = importlib.util.spec_from_file_location("openvla_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build_server(script, monkeypatch):
    """A function that returns a server of a tiny model with a configuration."""

    def build(fields, **arguments):
        model, processor = build_tiny(norm_stats={"mine": STATISTICS}, **fields)
        policy = Policy(model, processor, "mine", constrain_actions=model.config.action_head is None)
        monkeypatch.setattr(script, "load_policy", lambda path, **options: policy)
        return script.OpenVLAModelServer("tiny", **arguments)

    return build


def observations(count):
    random = np.random.default_rng(0)
    return [
        {
            "images": {name: random.integers(0, 256, (64, 64, 3), np.uint8) for name in ("agentview", "wrist")},
            "states": random.normal(size=8),
            "task_description": INSTRUCTION,
        }
        for _ in range(count)
    ]


def play(server, sent, episodes=1):
    """Return the actions of every episode, and what the server says of itself."""
    import anyio
    from vla_eval.api import serve_background
    from vla_eval.connection import Connection

    async def run(url):
        connection = Connection(url, timeout=60)
        await connection.connect()
        played = []
        for _ in range(episodes):
            await connection.start_episode({"task": {"name": INSTRUCTION}})
            played.append([(await connection.act(observation))["actions"] for observation in sent])
            await connection.end_episode({"metrics": {"success": True}})
        info = connection.server_info
        await connection.close()
        return played, info

    with serve_background(server) as handle:
        return anyio.run(run, handle.url)


def test_actions_are_the_policys_in_liberos_convention(build_server):
    server, sent = build_server({}), observations(2)
    (actions,), info = play(server, sent)
    policy = server.policy
    expected = [convert_action(policy.act(o["images"]["agentview"], INSTRUCTION), "libero") for o in sent]
    np.testing.assert_array_equal(actions, np.float32(expected))
    assert policy.processor.image_preset == "libero"  # of the reference's evaluation; the checkpoint names none
    assert info["observation_params"] == {"env_seed": 0}
    assert info["action_spec"]["gripper"]["format"] == "binary_close_positive"


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_chunks_begin_anew_in_every_episode(build_server, chunk_size):
    server, sent = build_server({**OFT, "chunk_length": 3}, chunk_size=chunk_size), observations(4)
    played, info = play(server, sent, episodes=2)
    expected = []
    for start in range(0, 4, chunk_size or 3):
        o = sent[start]
        chunk = server.policy.act(list(o["images"].values()), INSTRUCTION, o["states"])
        expected += list(convert_action(chunk[: chunk_size or 3], "libero"))
    np.testing.assert_array_equal(played, np.float32([expected[:4]] * 2))
    assert info["observation_params"] == {
        "env_seed": 0,
        "send_wrist_image": True,
        "send_state": True,
        "quat_no_antipodal": True,
    }
    assert not server.histories


def test_history_has_the_images_of_every_step_of_the_episode(build_server):
    server, sent = build_server({"image_sequence_len": 4, "use_wrist_image": True}), observations(3)
    played, _ = play(server, sent, episodes=2)
    expected = []
    for step in range(3):
        moments = [sent[max(step - 1, 0)], sent[step]]
        images = [image for moment in moments for image in moment["images"].values()]
        expected.append(convert_action(server.policy.act(images, INSTRUCTION), "libero"))
    np.testing.assert_array_equal(played, np.float32([expected] * 2))


@pytest.mark.parametrize(
    ("robot", "rotation", "gripper"),
    [
        ("simpler_widowx", "axis_angle", "binary_close_negative"),
        ("raw", "euler_xyz", "continuous_01"),
    ],
)
def test_other_robots_get_their_convention(build_server, robot, rotation, gripper):
    server, sent = build_server({}, robot=robot), observations(1)
    (actions,), info = play(server, sent)
    expected = convert_action(server.policy.act(sent[0]["images"]["agentview"], INSTRUCTION), robot)
    np.testing.assert_array_equal(actions, np.float32([expected]))
    assert server.policy.processor.image_preset is None
    assert (info["action_spec"]["rotation"]["format"], info["action_spec"]["gripper"]["format"]) == (rotation, gripper)


@pytest.mark.parametrize("missing", ["wrist", "states"])
def test_missing_observations_are_an_error(build_server, missing):
    """vla-eval's own server would take zeros for the state, and one camera for two."""
    server, sent = build_server({**OFT, "chunk_length": 3}), observations(1)
    sent[0].pop(missing, None)
    sent[0]["images"].pop(missing, None)
    with pytest.raises(RuntimeError, match="takes 2 cameras" if missing == "wrist" else "proprio"):
        play(server, sent)


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({}, {"robot": "franka"}, "Unknown robot 'franka'"),
        ({}, {"chunk_size": 8}, "chunk_size must be 1 to 1"),
        ({**OFT, "num_images_in_input": 3}, {}, "sends two cameras, but this model takes 3"),
        ({}, {"image_preset": "libre"}, "Unknown image_preset 'libre'"),
    ],
)
def test_arguments_that_do_not_fit_are_rejected(build_server, fields, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_server(fields, **arguments)


def test_demo_policies_are_loaded_by_path(script):
    folder = REPOSITORY / "assets" / "libero_oft"
    server = script.OpenVLAModelServer(str(folder))
    assert server.chunk_size == load_policy(folder).model.config.chunk_length
    assert server.policy.processor.image_preset == "none"
