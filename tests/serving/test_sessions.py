"""Sessions: earlier images and traces that the server keeps, and the history that a client keeps."""

import base64
import dataclasses
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

for package in ("fastapi", "uvicorn", "msgpack", "websockets", "prometheus_client"):
    pytest.importorskip(package)

from minivla import TINY_VQ, set_random_vq  # noqa: E402
from openvla import ActionQueue, Policy, PolicyClient, VisualTrace  # noqa: E402
from openvla.__main__ import main  # noqa: E402
from openvla.inference.visual_trace import evaluation_frame  # noqa: E402
from openvla.serving import sessions  # noqa: E402
from openvla.serving.client import RequestRejectedError  # noqa: E402
from openvla.serving.policy import BatchedPolicy  # noqa: E402
from openvla.serving.requests import RequestError, parse_json_request  # noqa: E402
from openvla.tiny import build_tiny  # noqa: E402
from servers import INSTRUCTION, LIMITS, ServerThread, build_policy, encode_picture, send_request  # noqa: E402
from tracevla import moving_points  # noqa: E402

FRAMES = np.random.RandomState(0).randint(0, 256, (14, 2, 40, 56, 3), dtype=np.uint8)
HISTORY = {**TINY_VQ, "image_sequence_len": 6, "use_wrist_image": True}  # three moments of two cameras


def policy_of(**fields):
    """Return the served policy of a tiny model whose tokens depend on its images: with larger weights of attention."""
    served = build_policy(**fields)
    if served.policy.model.config.action_vq is not None:
        set_random_vq(served.policy.model)
    with torch.no_grad():
        for layer in served.policy.model.language_model.get_decoder().layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.v_proj.weight.mul_(20)
    return served


@pytest.fixture(scope="module")
def minivla():
    """A server of a tiny MiniVLA with VQ actions, a history and a wrist camera."""
    with ServerThread(policy_of(**HISTORY)) as server:
        yield server


@pytest.fixture(scope="module")
def tracevla():
    """A server of a tiny TraceVLA that draws traces."""
    served = policy_of(trace_prompting=True)
    policy = dataclasses.replace(served.policy, visual_trace=VisualTrace(moving_points, seed=3))
    with ServerThread(type(served)(policy, "tiny", LIMITS)) as server:
        yield server


def body(step, session="arm", cameras=2, **fields):
    images = [encode_picture(image) for image in FRAMES[step, :cameras]]
    return {"image": images, "instruction": INSTRUCTION, "session": session, "step": step, **fields}


def act(server, **fields):
    """Return the reply's status, and its action or its error."""
    reply = send_request(server, body=fields)
    return reply.status, reply.json if reply.status == 200 else reply.error


@pytest.mark.parametrize("padding", ["start", "end"])
def test_a_session_has_the_actions_of_the_policy_itself(padding):
    served = policy_of(**HISTORY)
    served.policy.history_padding = padding
    policy = dataclasses.replace(served.policy)
    with ServerThread(type(served)(policy, "tiny", LIMITS)) as server:
        own = dataclasses.replace(policy)
        expected = [own.act(list(FRAMES[step]), INSTRUCTION).tolist() for step in range(5)]
        assert len(set(map(str, expected))) == 5
        other = dataclasses.replace(policy, history_padding={"start": "end", "end": "start"}[padding])
        assert [other.act(list(FRAMES[step]), INSTRUCTION).tolist() for step in range(2)][1] != expected[1]
        assert [act(server, **body(step))[1] for step in range(5)] == expected
        assert [act(server, **body(step))[1] for step in range(3)] == expected[:3]  # another episode, the same name
        whole = [encode_picture(image) for image in FRAMES[2:5].reshape(6, 40, 56, 3)]
        assert act(server, image=whole, instruction=INSTRUCTION)[1] == expected[4]  # all images, without a session


def test_sessions_do_not_mix_and_a_frame_may_be_sent_again(minivla):
    own = {name: dataclasses.replace(minivla.policy.policy) for name in ("left", "right")}
    for step in range(4):
        for offset, (name, policy) in enumerate(own.items()):
            fields = {**body(step + offset), "session": name, "step": step}
            expected = policy.act(list(FRAMES[step + offset]), INSTRUCTION).tolist()
            assert act(minivla, **fields) == act(minivla, **fields) == (200, expected)


@pytest.mark.parametrize(
    ("change", "status", "field", "message"),
    [
        ({"session": "new", "step": 3}, 409, "session", "No session 'new' is known: the server was restarted"),
        ({"step": 1}, 409, "step", "step must be above 2, that of the session's newest frame, or 0"),
        ({"step": 2}, 409, "step", "got 2 with other images"),
        ({"step": -1}, 422, "step", "step must be a whole number from 0 to"),
        ({"step": True}, 422, "step", "step must be a whole number"),
        ({"step": None}, 422, "step", "session and step go together"),
        ({"session": None}, 422, "session", "session and step go together"),
        ({"session": None, "step": None}, 422, "session", "needs images of earlier steps, too.*or send 6 images"),
        ({"image": [encode_picture(FRAMES[0, 0])] * 6}, 422, "image", r"takes 2 image\(s\) a step, got 6"),
        ({"session": None, "step": None, "image": [encode_picture(FRAMES[0, 0])] * 4}, 422, "image", "takes 6 camera"),
        ({"details": True, "traced_image": True}, 422, "traced_image", "no TraceVLA"),
        ({"traced_image": True}, 422, "details", "traced_image needs details: true"),
    ],
)
def test_a_frame_that_does_not_fit_is_refused(change, status, field, message, minivla):
    import re

    for step in range(3):
        assert act(minivla, **body(step))[0] == 200
    fields = {name: value for name, value in {**body(3), **change}.items() if value is not None}
    got, error = act(minivla, **fields)
    assert (got, error["field"]) == (status, field)
    assert re.search(message, error["message"])


def test_a_session_that_the_model_needs_not_is_refused(server, frame):
    picture = encode_picture(frame)
    status, error = act(server, image=picture, instruction="go", session="arm", step=0)
    assert (status, error["field"]) == (422, "session")
    assert "needs nothing of earlier steps; leave session and step out" in error["message"]


def test_the_session_that_was_used_longest_ago_is_forgotten(monkeypatch):
    served = policy_of(**HISTORY)
    served = BatchedPolicy(served.policy, "tiny", dataclasses.replace(LIMITS, max_sessions=2))

    def prepare(step, session):
        return served.prepare(parse_json_request(json.dumps(body(step, session)).encode(), LIMITS))

    for step, session in ((0, "a"), (0, "b"), (1, "a"), (0, "c"), (2, "a"), (1, "c")):
        prepare(step, session)
    assert len(served.sessions) == 2
    with pytest.raises(RequestError, match="2 other ones were used since"):
        prepare(1, "b")
    prepare(3, "a")
    monkeypatch.setattr(sessions, "MAX_BYTES", 3 * 2 * 3 * 40 * 56)  # of one session's images
    prepare(4, "a")
    assert len(served.sessions) == 1


def test_a_session_ends_where_its_frame_cannot_be_used():
    def broken_tracker(video, **points):
        return torch.full((1, 10, 900, 2), torch.nan)

    model, processor = build_tiny(trace_prompting=True)
    served = BatchedPolicy(Policy(model, processor, "untrained", True, VisualTrace(broken_tracker)), "tiny", LIMITS)
    for step in range(11):
        request = parse_json_request(json.dumps(body(step, cameras=1)).encode(), LIMITS)
        if step < 9:
            served.prepare(request)
            continue
        with pytest.raises(ValueError, match="must return finite positions" if step == 9 else "could not be used"):
            served.prepare(request)


def test_the_server_draws_traces_and_returns_the_image(tracevla):
    info = send_request(tracevla, "GET", "/info").json
    assert (info["cameras"], info["images_per_moment"], info["draws_traces"]) == (2, 1, True)
    policy = tracevla.policy.policy
    expected_trace, own = VisualTrace(moving_points, seed=3), dataclasses.replace(policy)
    own.visual_trace = VisualTrace(moving_points, seed=3)
    for step in range(14):
        fields = body(step, cameras=1, details=True, traced_image=True)
        status, reply = act(tracevla, **fields)
        assert (status, reply) == (200, {**reply, "actions": own.act(FRAMES[step, 0], INSTRUCTION).tolist()})
        traced = expected_trace.update(evaluation_frame(FRAMES[step, 0]))
        assert (traced is None) == (reply["traced_image"] is None) == (step < 9)
        if traced is not None:
            with Image.open(io.BytesIO(base64.b64decode(reply["traced_image"]))) as image:
                assert np.array_equal(np.array(image), np.array(traced))
        again = act(tracevla, **fields)[1]
        assert (again["actions"], again["traced_image"]) == (reply["actions"], reply["traced_image"])
    assert policy.visual_trace.step == 0  # sessions have their own
    status, error = act(tracevla, image=encode_picture(FRAMES[0, 0]), instruction="go")
    assert (status, error["field"]) == (422, "session")
    pair = [encode_picture(FRAMES[0, 0]), encode_picture(FRAMES[1, 0])]  # a client that draws by itself
    status, reply = act(tracevla, image=pair, instruction="go", details=True, traced_image=True)
    with Image.open(io.BytesIO(base64.b64decode(reply["traced_image"]))) as image:
        assert np.array_equal(np.array(image), FRAMES[1, 0])


def test_two_sessions_have_two_traces(tracevla):
    for step in range(10):
        replies = {}
        for session, reverse in (("one", False), ("other", True)):
            frame = encode_picture(FRAMES[step, 0][:, ::-1] if reverse else FRAMES[step, 0])
            fields = {**body(step, session, cameras=1, details=True, traced_image=True), "image": frame}
            replies[session] = act(tracevla, **fields)[1]["traced_image"]
    assert replies["one"] != replies["other"]
    assert None not in replies.values()


@pytest.mark.parametrize("padding", ["start", "end"])
def test_a_client_keeps_the_history(padding):
    served = policy_of(**HISTORY)
    policy = dataclasses.replace(served.policy, history_padding=padding)
    with ServerThread(type(served)(policy, "tiny", LIMITS)) as server:
        client, own = PolicyClient(server.url, timeout=30), dataclasses.replace(policy)
        for _ in range(2):
            buffer = FRAMES[0].copy()  # a camera that writes every frame into one array
            for step in range(5):
                buffer[:] = FRAMES[step]
                images = [buffer[0], buffer[1]]
                assert client.act(images, INSTRUCTION).tolist() == own.act(images, INSTRUCTION).tolist()
            client.reset()
            own.reset()
        whole = list(FRAMES[:3].reshape(6, 40, 56, 3))
        assert client.act(whole, INSTRUCTION).tolist() == own.act(whole, INSTRUCTION).tolist()
        with pytest.raises(RequestRejectedError, match="takes 6 camera images a moment, got 3"):
            client.act(whole[:3], INSTRUCTION)


def test_a_queue_gives_a_client_the_frames_of_every_step(minivla):
    """Also those of steps whose actions were queued, and those before the client knows the model."""
    queues = [
        ActionQueue(policy, n_action_steps=3)
        for policy in (PolicyClient(minivla.url, timeout=30), dataclasses.replace(minivla.policy.policy))
    ]
    for _ in range(2):
        for step in range(8):
            mine, theirs = (queue.act(list(FRAMES[step]), INSTRUCTION) for queue in queues)
            assert mine.tolist() == theirs.tolist()
        for queue in queues:
            queue.reset()
    client = PolicyClient(minivla.url, timeout=30)
    queue, own = ActionQueue(client, n_action_steps=1), dataclasses.replace(minivla.policy.policy)
    history = own.new_history()
    with ThreadPoolExecutor(1) as thread:
        minivla.policy.gate.clear()
        future = queue.request_async(thread, list(FRAMES[0]), INSTRUCTION)
        for step in (1, 2):  # while the first request waits
            assert queue.request_async(thread, list(FRAMES[step]), INSTRUCTION) is None
        minivla.policy.gate.set()
        assert future.result(30)
        queue.next()
        assert queue.request_async(thread, list(FRAMES[3]), INSTRUCTION).result(30)
    for step in range(4):
        images = history.append(list(FRAMES[step]))
    assert queue.next().tolist() == own.act(images, INSTRUCTION)[0].tolist()


def test_a_client_s_frames_get_the_traces_that_the_server_draws(tracevla):
    client = PolicyClient(tracevla.url, timeout=30)
    policy = tracevla.policy.policy
    for _ in range(2):
        own = dataclasses.replace(policy, visual_trace=VisualTrace(moving_points, seed=3))
        for step in range(12):
            action = client.act(FRAMES[step, 0], INSTRUCTION)
            assert action.tolist() == own.act(FRAMES[step, 0], INSTRUCTION).tolist()
        client.reset()
    pair = [FRAMES[0, 0], FRAMES[1, 0]]
    plain = dataclasses.replace(policy, visual_trace=None)
    assert client.act(pair, INSTRUCTION).tolist() == plain.act(pair, INSTRUCTION).tolist()


def test_a_client_of_a_restarted_server_must_begin_an_episode():
    model, processor = build_tiny(trace_prompting=True)
    policy = Policy(model, processor, "untrained", True, VisualTrace(moving_points))
    served = type(build_policy())
    with ServerThread(served(policy, "tiny", LIMITS)) as server:
        client = PolicyClient(server.url, timeout=30)
        client.act(FRAMES[0, 0], INSTRUCTION)
        port = server.port
    with ServerThread(served(policy, "tiny", LIMITS), port=port):
        with pytest.raises(RequestRejectedError, match="the server was restarted.*Begin an episode") as refused:
            client.act(FRAMES[1, 0], INSTRUCTION)
        assert refused.value.status == 409
        client.reset()
        assert client.act(FRAMES[1, 0], INSTRUCTION).shape == (7,)


def test_traces_need_cotracker_and_a_tracevla(tmp_path, capsys):
    assert main(["serve", "--cotracker", str(tmp_path / "scaled_offline.pth")]) == 2
    assert "CoTracker3 needs Meta's package" in capsys.readouterr().err
