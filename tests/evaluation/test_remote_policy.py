"""Policies on servers of openpi's protocol: over loopback, with the package openpi-client where it is installed."""

import argparse
import contextlib
import json
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from openvla.__main__ import main
from openvla.decoding_openvla import NoActionError
from openvla.errors_openvla import OpenVLAError
from openvla.evaluation import cli
from openvla.inference.robot_conventions import convert_action
from reference import REPOSITORY
from servers import OFT_CONFIG, ServerThread, build_policy, predict_directly

pytest.importorskip("msgpack")
pytest.importorskip("websockets")
from openvla.evaluation.remote_policy import RemotePolicy, ServerConnectionError, ServerConvention, convention_of
from openvla.inference.openpi_messages import pack_msgpack, unpack_msgpack

INSTRUCTION = "pick up the milk"
FRAMES = [np.random.default_rng(seed).integers(0, 256, (256, 256, 3), np.uint8) for seed in range(2)]
STATE = np.linspace(-1, 1, 8)
CHUNK = np.random.default_rng(2).uniform(-1, 1, (10, 7))


@contextlib.contextmanager
def serve(answer, metadata=None, pack=pack_msgpack, unpack=unpack_msgpack):
    """Yield the URL of a server and its requests; ``answer(request)`` returns a reply, text, or None to die."""
    from websockets.sync.server import serve as listen

    requests = []

    def handle(websocket):
        websocket.send(metadata if isinstance(metadata, (str, bytes)) else pack(metadata or {}))
        for message in websocket:
            requests.append(unpack(message))
            reply = answer(requests[-1])
            if reply is None:
                return websocket.close()
            websocket.send(reply if isinstance(reply, (str, bytes)) else pack(reply))
        return None

    with listen(handle, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}", requests
        server.shutdown()
        thread.join(20)


@contextlib.contextmanager
def connected(*arguments, **keywords):
    policy = RemotePolicy(*arguments, **keywords)
    try:
        yield policy
    finally:
        policy.close()


def test_request_and_reply_are_those_of_openpis_libero_example():
    with serve(lambda request: {"actions": CHUNK}) as (url, requests), connected(url) as policy:
        action = policy.act(FRAMES, INSTRUCTION, STATE)
        description = policy.describe()
    np.testing.assert_array_equal(action, CHUNK)
    assert set(requests[0]) == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
    assert [requests[0][f"observation/{name}"].shape for name in ("image", "wrist_image")] == [(224, 224, 3)] * 2
    np.testing.assert_array_equal(requests[0]["observation/state"], STATE)
    assert (requests[0]["observation/image"].dtype, requests[0]["prompt"]) == (np.uint8, INSTRUCTION)
    assert (description["n_action_steps"], description["server"]["gripper"]) == (5, "libero")


def test_keys_and_sizes_can_be_others():
    fields = {"image": "agentview", "wrist_image": None, "state": None, "prompt": "task", "actions": "chunk"}
    with (
        serve(lambda request: {"chunk": CHUNK.astype(np.float32)}) as (url, requests),
        connected(url, image_size=None, **fields) as policy,
    ):
        np.testing.assert_array_equal(policy.act(FRAMES, INSTRUCTION), CHUNK.astype(np.float32))
    assert set(requests[0]) == {"agentview", "task"}
    np.testing.assert_array_equal(requests[0]["agentview"], FRAMES[0])


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"actions": CHUNK[:, :6]}, r"shape \(10, 6\), but LIBERO takes chunks"),
        ({"actions": np.zeros((10, 32))}, r"shape \(10, 32\)"),
        ({"actions": CHUNK[0]}, r"shape \(7,\)"),
        ({"actions": CHUNK[None]}, r"shape \(1, 10, 7\)"),
        ({"actions": CHUNK[:0]}, r"shape \(0, 7\)"),
        ({"actions": CHUNK * np.nan}, "not finite"),
        ({"actions": "open"}, "must be finite numbers"),
        ({"action": CHUNK}, r"has no 'actions', it has \['action'\]"),
        ([1, 2], "has no 'actions', it has list"),
        (b"\xc1", "no message of openpi's protocol"),
        ("Traceback\nKeyError: 'norm_stats'", r"rejects the observation, which has the keys \['obs.*KeyError: 'norm_s"),
        ({"actions": CHUNK[:4]}, "n-action-steps is 5, but .* answers chunks of 4 actions; give 1 to 4"),
    ],
)
def test_replies_that_are_no_chunk_are_errors(reply, message):
    with (
        serve(lambda request: reply) as (url, _),
        connected(url) as policy,
        pytest.raises(OpenVLAError, match=f"(?s){message}"),
    ):
        policy.describe()


def test_chunk_of_another_length_than_before_is_an_error():
    """Also where ``openvla serve`` announces single actions."""
    lengths = iter([10, 8])
    with serve(lambda request: {"actions": CHUNK[: next(lengths)]}) as (url, _), connected(url) as policy:
        policy.act(FRAMES, INSTRUCTION, STATE)
        with pytest.raises(OpenVLAError, match="a chunk of 8 actions, but 10 were expected"):
            policy.act(FRAMES, INSTRUCTION, STATE)
    with (
        serve(lambda request: {"actions": CHUNK}, OPENVLA) as (url, _),
        connected(url) as policy,
        pytest.raises(OpenVLAError, match="a chunk of 10 actions, but 1 were expected"),
    ):
        policy.act(FRAMES, INSTRUCTION, STATE)


def test_server_that_dies_or_hangs_is_an_error():
    with (
        serve(lambda request: None) as (url, _),
        connected(url) as policy,
        pytest.raises(ServerConnectionError, match="gave no action within 60 s, or died"),
    ):
        policy.act(FRAMES, INSTRUCTION, STATE)
    gate = threading.Event()
    with serve(lambda request: gate.wait(20) and None) as (url, _), connected(url, timeout=0.1) as policy:
        with pytest.raises(ServerConnectionError, match=r"within 0.1 s, or died \(TimeoutError"):
            policy.act(FRAMES, INSTRUCTION, STATE)
        with pytest.raises(ServerConnectionError):  # its late reply is not taken for this one's
            policy.act(FRAMES, INSTRUCTION, STATE)
        gate.set()
    with pytest.raises(ServerConnectionError, match="No server of openpi's protocol .*ConnectionRefused"):
        RemotePolicy(url)
    with (
        serve(lambda request: None, "no norm stats") as (url, _),
        pytest.raises(ServerConnectionError, match="an error in place of its metadata: no norm stats"),
    ):
        RemotePolicy(url)


def test_no_action_of_openvla_serve_is_a_failure_of_the_episode():
    with serve(lambda request: "no_action: it ended early") as (url, _), connected(url) as policy:
        with pytest.raises(NoActionError, match="it ended early"):
            policy.act(FRAMES, INSTRUCTION, STATE)
        policy.describe()  # a grey frame may well give none


def test_another_model_on_the_same_server_is_an_error():
    messages = iter([pack_msgpack({"model": name}) for name in "ab"])

    def send_metadata(value):
        return next(messages)

    with (
        serve(lambda request: None, {"a": 1}, pack=send_metadata) as (url, _),
        connected(url) as policy,
        pytest.raises(OpenVLAError, match="was another model started there"),
    ):
        policy.clone()


OPENVLA = {
    "default_unnorm_key": "mine",
    "chunk_length": 1,
    "cameras": 1,
    "proprio_dim": None,
    "action_dim": 7,
    "image_preset": "libero",
    "constrain_actions": True,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"wrist_image": None, "state": None}),
        ({"cameras": 2, "proprio_dim": 8, "chunk_length": 8}, {}),
        ({"proprio_dim": 14}, "takes 1 images and 14 numbers of proprio, and answers 7"),
        ({"action_dim": 14}, "answers 14"),
        ({"cameras": 3}, "takes 3 images"),
        ({"image_preset": "libero-raw"}, "rotates the simulator's frames"),
    ],
)
def test_convention_of_openvla_serve_is_read_from_its_metadata(change, expected):
    metadata = {**OPENVLA, **change}
    if isinstance(expected, str):
        with pytest.raises(OpenVLAError, match=expected):
            convention_of(metadata)
        return
    common = {"image_size": None, "gripper": "openvla", "n_action_steps": None}
    assert convention_of(metadata) == ServerConvention(**{**common, **expected})
    assert convention_of({"reset_pose": [0]}) == ServerConvention()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gripper": "open"}, "must be one of"),
        ({"image_size": 512}, "16 to 256"),
        ({"n_action_steps": 0}, "1 or more"),
        ({"image": "prompt"}, "must differ"),
        ({"image": ""}, "must differ"),
    ],
)
def test_conventions_that_cannot_be_are_rejected(fields, message):
    with pytest.raises(OpenVLAError, match=message):
        ServerConvention(**fields)
    with pytest.raises(OpenVLAError, match="must be ws://host:port"):
        RemotePolicy("http://127.0.0.1:1")


@pytest.mark.parametrize("name", ["bins", "oft"])
def test_actions_behind_openvla_serve_are_the_policys(name):
    config = {} if name == "bins" else {**OFT_CONFIG, "num_images_in_input": 2}
    with ServerThread(build_policy(**config)) as server, connected(server.url.replace("http", "ws")) as policy:
        images = FRAMES[0] if name == "bins" else FRAMES
        state = None if name == "bins" else STATE
        expected = predict_directly(server.policy, images, INSTRUCTION, state)
        np.testing.assert_array_equal(policy.act(FRAMES, INSTRUCTION, STATE), np.atleast_2d(expected))
        description = policy.describe()
    assert description["unnorm_key"] == server.policy.policy.unnorm_key
    assert "does not prepare frames" in description["warnings"][0]
    assert description["server"]["wrist_image"] == (None if name == "bins" else "observation/wrist_image")


def test_token_is_sent_as_openpis_api_key():
    token = "a-secret-of-twenty-two"
    with ServerThread(build_policy(), token=token) as server:
        url = server.url.replace("http", "ws")
        with pytest.raises(ServerConnectionError, match="401.*give its token"):
            RemotePolicy(url)
        with connected(url, token=token) as policy:
            assert policy.metadata["action_dim"] == 7


# -- the harness ------------------------------------------------------------------------------------------------------


def play(policy, observations, episodes=2):
    """Return the actions that the simulator would get, and the server's failure."""
    harness = pytest.importorskip("openvla.evaluation.vla_eval", reason="needs vla-eval", exc_type=ImportError)
    import anyio
    from vla_eval.api import serve_background
    from vla_eval.connection import Connection

    server = harness.RemotePolicyServer(policy)

    async def run(url):
        connection = Connection(url, timeout=60)
        await connection.connect()
        played = []
        try:
            for _ in range(episodes):
                await connection.start_episode({"task": {"name": INSTRUCTION}})
                played.append([(await connection.act(observation))["actions"] for observation in observations])
                await connection.end_episode({"metrics": {"success": True}})
        except RuntimeError:
            played = None
        finally:
            await connection.close()
        return played, connection.server_info["observation_params"]

    with serve_background(server) as handle:
        return *anyio.run(run, handle.url), server


OBSERVATION = {"images": {"agentview": FRAMES[0], "wrist": FRAMES[1]}, "states": STATE, "task_description": INSTRUCTION}


@pytest.mark.parametrize("gripper", ["libero", "openvla"])
def test_five_actions_of_a_chunk_are_executed_in_liberos_convention(gripper):
    chunk = np.concatenate([CHUNK[:, :6], np.linspace(0, 1, 10)[:, None]], axis=1)
    with (
        serve(lambda request: {"actions": chunk + 0.01 * (len(requests) % 2)}) as (url, requests),
        connected(url, gripper=gripper) as policy,
    ):
        chunk[:, 6] *= 0.98
        played, params, server = play(policy, [OBSERVATION] * 7, episodes=1)
    expected = np.concatenate([(chunk + 0.01)[:5], chunk[:2]])
    expected = convert_action(expected, "libero") if gripper == "openvla" else expected
    np.testing.assert_array_equal(played[0], np.float32(expected))
    assert params == {"send_wrist_image": True, "send_state": True, "quat_no_antipodal": True}
    assert len(requests) == 2
    assert server.failure is None
    assert len(server.warnings()) == (gripper == "libero")  # none of these grippers is below 0, LIBERO's open


def test_every_episode_begins_with_a_chunk_of_its_own():
    with serve(lambda request: {"actions": CHUNK}) as (url, requests), connected(url) as policy:
        played, _, _ = play(policy, [OBSERVATION] * 2)
    np.testing.assert_array_equal(played, np.float32([CHUNK[:2]] * 2))
    assert len(requests) == 2


def test_death_of_the_server_ends_the_evaluation():
    with serve(lambda request: None) as (url, _), connected(url) as policy:
        _, _, server = play(policy, [OBSERVATION])
    assert isinstance(server.failure, ServerConnectionError)
    with serve(lambda request: "no_action: words") as (url, _), connected(url) as policy:
        _, _, server = play(policy, [OBSERVATION])
    assert server.failure is None


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--server-gripper", "openvla"], "--server-gripper is for a policy on a server: give --server"),
        (["--server", "ws://127.0.0.1:1", "--model", "m"], "--model is for a model in this process"),
        (["--server", "ws://127.0.0.1:1", "--no-constrain-actions"], "--constrain-actions is for a model"),
        (["--server", "ws://127.0.0.1:1", "--prepack"], "--prepack is for a model"),
    ],
)
def test_options_that_would_be_ignored_are_rejected(options, message, capsys):
    assert main(["evaluate", *options]) == 2
    assert message in capsys.readouterr().err


def connect(*options):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.connect_from_args(parser.parse_args(list(options)))


def test_options_reach_the_convention(tmp_path):
    (tmp_path / "token").write_text("secret\n")
    with serve(lambda request: {"actions": CHUNK}) as (url, _):
        policy = connect(
            *("--server", url, "--server-keys", "image=front", "wrist_image=", "prompt=task", "--n-action-steps", "3"),
            *("--server-image-size", "128", "--server-gripper", "openvla", "--server-timeout", "5"),
            *("--server-token-file", str(tmp_path / "token")),
        )
        policy.close()
        with pytest.raises(OpenVLAError, match="takes NAME=KEY with a name of .*, got 'camera=x'"):
            connect("--server", url, "--server-keys", "camera=x")
    assert policy.convention == ServerConvention(
        image="front", wrist_image=None, prompt="task", image_size=128, gripper="openvla", n_action_steps=3
    )
    assert policy.timeout == 5


# -- the package openpi-client: bash ci/integration_openpi.sh ---------------------------------------------------------


def test_server_that_packs_with_openpi_client_understands_and_is_understood():
    messages = pytest.importorskip("openpi_client.msgpack_numpy")
    images = pytest.importorskip("openpi_client.image_tools")
    reply = {"actions": CHUNK, "server_timing": {"infer_ms": np.float64(1)}, "state": np.array([True, False])}
    with (
        serve(lambda request: reply, {"model": "pi0"}, messages.packb, messages.unpackb) as (url, requests),
        connected(url) as policy,
    ):
        np.testing.assert_array_equal(policy.act(FRAMES, INSTRUCTION, STATE), CHUNK)
        assert policy.metadata == {"model": "pi0"}
    for key, frame in (("observation/image", FRAMES[0]), ("observation/wrist_image", FRAMES[1])):
        np.testing.assert_array_equal(requests[0][key], images.resize_with_pad(frame, 224, 224))
    np.testing.assert_array_equal(requests[0]["observation/state"], STATE)


@pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")  # by openpi-client
def test_openpi_client_gets_the_same_chunk_from_openvla_serve():
    client = pytest.importorskip("openpi_client.websocket_client_policy")
    with ServerThread(build_policy(**{**OFT_CONFIG, "num_images_in_input": 2})) as server:
        theirs = client.WebsocketClientPolicy("127.0.0.1", server.port)
        request = {"observation/image": FRAMES[0], "observation/wrist_image": FRAMES[1], "observation/state": STATE}
        reply = theirs.infer({**request, "prompt": INSTRUCTION})
        with connected(server.url.replace("http", "ws")) as policy:
            np.testing.assert_array_equal(policy.act(FRAMES, INSTRUCTION, STATE), reply["actions"])
            assert policy.metadata == theirs.get_server_metadata()
        theirs._ws.close()


# -- with the simulator: python -m pytest -m libero -------------------------------------------------------------------


@pytest.mark.libero
@pytest.mark.parametrize("name", ["libero", "libero_oft"])
def test_demo_policies_behind_openvla_serve_have_the_same_episodes(name, tmp_path):
    model = str(REPOSITORY / "assets" / name)
    constrained = ["--constrain-actions"] if name == "libero" else []
    arguments = ["--tasks", "0", "--episodes", "1", "--first-initial-state", "1", "--max-steps", "110", "--json"]

    def evaluate(folder, *options):
        command = [sys.executable, "-m", "openvla", "evaluate", *options, *arguments]
        command += ["--output", str(tmp_path / folder)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    local = evaluate("local", "--model", model, *constrained)
    command = [sys.executable, "-m", "openvla", "serve", "--model", model, "--port", "0", *constrained]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        for line in server.stderr:
            if port := re.search(r"http://127.0.0.1:(\d+)", line):
                break
        drain = threading.Thread(target=server.stderr.read, daemon=True)
        drain.start()
        try:
            remote = evaluate("remote", "--server", f"ws://127.0.0.1:{port[1]}")
        finally:
            server.terminate()
    runs = [[(run["success"], run["steps"]) for run in report["results"][0]["runs"]] for report in (local, remote)]
    assert runs[0] == runs[1]
    own = {"model", "weights_digest", "server", "results", "constrain_actions", "actions"}  # a server has its own
    assert {name: local[name] for name in local.keys() - own} == {name: remote[name] for name in remote.keys() - own}


@pytest.mark.libero
def test_death_of_the_server_names_it_and_keeps_the_episodes(tmp_path, capsys):
    count = iter(range(100))
    still = np.tile([0.0] * 6 + [-1.0], (5, 1))
    arguments = ["--tasks", "0", "--episodes", "3", "--max-steps", "5", "--output", str(tmp_path)]
    with serve(lambda request: {"actions": still} if next(count) < 3 else None) as (url, _):
        assert main(["evaluate", "--server", url, *arguments]) == 2  # after the check and two episodes
    assert re.search(r"ServerConnectionError: ws://.* gave no action within 60 s, or died", capsys.readouterr().err)
    videos = list((tmp_path / "episodes").glob("task*.mp4"))
    assert len([video for video in videos if "error" not in video.name]) == 2
