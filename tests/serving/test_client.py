"""PolicyClient: the same actions as the policy itself; slow, restarted and broken servers."""

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from openvla import ActionQueue, PolicyClient
from openvla.serving.client import PolicyServerError, RequestRejectedError, ServerUnavailableError
from PIL import Image

for package in ("fastapi", "uvicorn", "msgpack", "websockets", "prometheus_client"):
    pytest.importorskip(package)

from openvla.serving.cli import Limits  # noqa: E402
from servers import (  # noqa: E402
    INSTRUCTION,
    OFT_CONFIG,
    STATE,
    ServerProcess,
    ServerThread,
    build_policy,
    predict_directly,
    start_threads,
)

LONG_CHUNKS = {**OFT_CONFIG, "chunk_length": 40}


@pytest.fixture(scope="module")
def server():
    with ServerThread(build_policy(Limits(max_queue_size=1))) as server:
        yield server


@pytest.fixture(scope="module")
def expected_action(server, frame):
    return predict_directly(server.policy, frame).tolist()


def test_actions_equal_those_of_the_policy(server, frame, expected_action, tmp_path):
    client = PolicyClient(server.url, timeout=30)
    client.reset()
    Image.fromarray(frame).save(tmp_path / "frame.png")
    planes = torch.from_numpy(frame).permute(2, 0, 1)
    for image in (frame, frame / 255, Image.fromarray(frame), planes, planes / 255, tmp_path / "frame.png"):
        action = client.act(image, INSTRUCTION)
        assert (action.dtype, action.tolist()) == (np.float64, expected_action)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    Image.fromarray(np.rot90(frame)).save(tmp_path / "photo.png", exif=sideways)
    assert client.act(tmp_path / "photo.png", INSTRUCTION).tolist() == expected_action
    assert client.info()["action_dim"] == 7
    client.close()
    assert client.act(frame, INSTRUCTION).tolist() == expected_action


def test_chunks_of_several_cameras(frame):
    policy = build_policy(num_images_in_input=2, **LONG_CHUNKS)
    with ServerThread(policy) as server:
        client = PolicyClient(server.url, timeout=30, unnorm_key="lab")
        policy.policy.unnorm_key = "lab"
        for state in (STATE, STATE.tolist(), torch.from_numpy(STATE)):
            chunk = client.act([frame, frame[::-1]], INSTRUCTION, state)
            assert chunk.tolist() == policy.policy.act([frame, frame[::-1]], INSTRUCTION, STATE).tolist()


def test_rejected_request_names_the_field(server, frame):
    client = PolicyClient(server.url)
    with pytest.raises(RequestRejectedError, match="422: state must|trained without the robot's state") as refused:
        client.act(frame, INSTRUCTION, [0.0])
    assert (refused.value.status, refused.value.field) == (422, "proprio")
    assert isinstance(refused.value, ValueError)
    with pytest.raises(RequestRejectedError, match="must lie in"):
        client.act(frame / 1.0, INSTRUCTION)
    with pytest.raises(TypeError, match="An image must be"):
        client.act({"not": "an image"}, INSTRUCTION)
    with pytest.raises(RequestRejectedError, match="got dtype uint16"):
        client.act(frame.astype(np.uint16), INSTRUCTION)
    with pytest.raises(ValueError, match="8 bits a channel, got mode I;16"):
        client.act(Image.new("I;16", (8, 8)), INSTRUCTION)
    with pytest.raises(ValueError, match="must be text, got bytes: b'go'"):
        client.act(frame, b"go")


def test_token_is_sent(frame, expected_action):
    token = "a-long-enough-secret"
    with ServerThread(build_policy(), token=token) as server:
        with pytest.raises(RequestRejectedError, match="401: This server needs a token"):
            PolicyClient(server.url, token="another-long-secret").act(frame, INSTRUCTION)
        assert PolicyClient(server.url, token=token).act(frame, INSTRUCTION).tolist() == expected_action


def test_timeout_raises_in_time(server, frame):
    server.policy.gate.clear()
    started = time.monotonic()
    with pytest.raises(ServerUnavailableError, match="504|timed out"):
        PolicyClient(server.url, timeout=0.3).act(frame, INSTRUCTION)
    assert 0.2 < time.monotonic() - started < Limits().timeout_s / 2  # its own, not the one of the server
    server.policy.gate.set()
    server.wait_until_prepared(0)


def test_503_is_retried_after_retry_after(server, frame, expected_action):
    server.policy.gate.clear()
    client = PolicyClient(server.url, timeout=20)
    first, results = start_threads(lambda: PolicyClient(server.url, timeout=20).act(frame, INSTRUCTION))
    server.wait_until_prepared(1)
    with pytest.raises(ServerUnavailableError, match=r"503: 1 requests are waiting.*\(tried 1 times"):
        PolicyClient(server.url, retries=0).act(frame, INSTRUCTION)
    started = time.monotonic()
    threading.Timer(0.2, server.policy.gate.set).start()
    assert client.act(frame, INSTRUCTION).tolist() == expected_action
    assert time.monotonic() - started >= 1  # Retry-After
    first[0].join()
    assert results[0].tolist() == expected_action


def test_client_recovers_from_a_killed_server(frame, expected_action):
    server = ServerProcess(build_policy())
    client = PolicyClient(server.url, timeout=30, retries=30)
    assert client.act(frame, INSTRUCTION).tolist() == expected_action
    os.kill(server.process.pid, signal.SIGKILL)
    server.process.join()
    with pytest.raises(ServerUnavailableError, match="ConnectionRefused"):
        PolicyClient(server.url, timeout=1).act(frame, INSTRUCTION)
    threads, results = start_threads(lambda: client.act(frame, INSTRUCTION))  # while it is away
    time.sleep(0.2)
    again = ServerProcess(build_policy(), server.port)
    threads[0].join()
    assert results[0].tolist() == expected_action
    os.kill(again.process.pid, signal.SIGTERM)
    again.process.join()


@pytest.mark.parametrize(
    ("reply", "error", "message"),
    [
        (b"", ServerUnavailableError, "did not answer"),
        (b"rubbish\r\n\r\n", ServerUnavailableError, "did not answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", ServerUnavailableError, "IncompleteRead|did not answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", PolicyServerError, "replied b'hello'"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"error"', PolicyServerError, "The reply is no action: error"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 3\r\n\r\n<p>", PolicyServerError, "502: .* replied b'<p>'"),
        (
            b'HTTP/1.1 200 OK\r\nContent-Length: 59\r\n\r\n{"__numpy__": "AAAAAAAA+H8=", "dtype": "<f8", "shape": [1]}',
            PolicyServerError,
            "no finite action",
        ),
    ],
)
def test_malformed_replies_raise(reply, error, message, frame):
    def talk(listener):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                is_info = connection.recv(65536).startswith(b"GET /info")
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}" if is_info else reply)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=talk, args=(listener,), daemon=True).start()
        client = PolicyClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=2, retries=1)
        with pytest.raises(error, match=message):
            client.act(frame, INSTRUCTION)


def test_invalid_arguments_raise():
    for url in ("gpu:8000", "ftp://gpu", "http://", "http://gpu/act?x"):
        with pytest.raises(ValueError, match="url must be"):
            PolicyClient(url)
    for wrong in ({"timeout": 0}, {"timeout": float("inf")}, {"retries": -1}, {"retries": 1.5}):
        with pytest.raises(ValueError, match="must be"):
            PolicyClient("http://gpu:8000", **wrong)


def test_control_loop_keeps_its_rate_with_a_slow_server(frame):
    """The loop takes 15 steps while it waits for a reply, and then skips the actions of these steps."""
    policy, period = build_policy(**LONG_CHUNKS), 0.01
    chunk = policy.policy.act(frame, INSTRUCTION, STATE)
    with ServerThread(policy) as server, ThreadPoolExecutor(1) as thread:
        player = ActionQueue(PolicyClient(server.url, timeout=30), n_action_steps=10)
        player.push(player.request(), player.policy.act(frame, INSTRUCTION, STATE))  # the first is waited for
        policy.gate.clear()
        asked = []
        for step in range(25):
            asked.append(player.request_async(thread, frame, INSTRUCTION, STATE))
            assert player.next().tolist() == chunk[step].tolist()
            time.sleep(period)
        assert [step for step, future in enumerate(asked) if future] == [10]
        assert not asked[10].done()  # nothing was waited for
        policy.gate.set()
        assert asked[10].result(30)
        assert player.next().tolist() == chunk[15].tolist()  # the answer to step 10, at step 25


def test_missing_action_has_the_request_error_as_cause(frame):
    player = ActionQueue(PolicyClient("http://127.0.0.1:9", timeout=0.2, retries=0), n_action_steps=1)
    player.push(player.request(), np.zeros((2, 7)))
    player.next()
    with ThreadPoolExecutor(1) as thread:
        assert isinstance(player.request_async(thread, frame, INSTRUCTION).exception(), ServerUnavailableError)
        player.next()
        assert player.needs_chunk  # it may be asked again
        with pytest.raises(ValueError, match="There is no action for step 2") as ended:
            player.next()
    assert isinstance(ended.value.__cause__, ServerUnavailableError)
