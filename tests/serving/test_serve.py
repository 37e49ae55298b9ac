"""The policy server: access and time limits, errors, queue, page, command, shutdown."""

import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch
from openvla import PolicyClient
from openvla.__main__ import main
from openvla.errors_openvla import OpenVLAKeyError
from openvla.serving.cli import MIN_TOKEN_LENGTH, TOKEN_VARIABLE, Limits
from openvla.serving.client import NoActionPredictedError
from reference import REPOSITORY
from test_house import imports

for package in ("fastapi", "uvicorn", "msgpack", "websockets", "prometheus_client"):
    pytest.importorskip(package)

from servers import (  # noqa: E402
    INSTRUCTION,
    LIMITS,
    VALID_REQUEST,
    ServerProcess,
    ServerThread,
    build_policy,
    connect_openpi,
    predict_directly,
    rejected_websocket_status,
    send_request,
    start_threads,
    wait_until,
)

TOKEN = "a-secret-of-twenty-two"


@pytest.fixture(scope="module")
def small():
    """A server with a queue of two requests."""
    with ServerThread(build_policy(Limits(max_queue_size=2))) as server:
        yield server


def test_too_large_body_is_rejected(server):
    assert send_request(server, body=b" " * (LIMITS.body_bytes + 1)).status == 413
    sent = iter([b" " * 2**20] * 8)
    assert send_request(server, body=sent, Transfer_Encoding="chunked").status == 413


def send_bytes(server, data, seconds=5):
    """Send bytes and return everything that the server sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(data)
        got = b""
        while chunk := connection.recv(65536):
            got += chunk
        return got


def test_slow_clients_are_disconnected(server):
    assert send_bytes(server, b"POST /act HT") == b""  # a head that never ends
    assert send_bytes(server, b"") == b""  # none at all
    got = send_bytes(server, b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert got.startswith(b"HTTP/1.1 408")
    first = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert send_bytes(server, first + b"GET /he").count(b"HTTP/1.1 200") == 1  # the second head never ends
    assert send_bytes(server, b"\x00\x01garbage\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_inflight_bytes_and_connections_are_limited(frame):
    with ServerThread(build_policy(Limits(connections=4, max_inflight_bytes=1000, header_seconds=1))) as server:
        body = {"image": frame.tolist(), "instruction": INSTRUCTION}
        flooded = send_request(server, body=body)
        assert (flooded.status, flooded.headers["retry-after"]) == (503, "1")
        assert send_request(server, body=b"{}").status == 422  # the bytes are no longer counted
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        wait_until(lambda: len(server.server.server_state.connections) >= 4)
        with pytest.raises(OSError, match="reset|closed"):
            send_request(server, "GET", "/healthz")
        wait_until(lambda: not server.server.server_state.connections)
        assert send_request(server, "GET", "/healthz").status == 200
        for connection in silent:
            connection.close()


def test_foreign_hosts_and_origins_are_rejected(server):
    assert send_request(server, "GET", "/info", Host="evil.example").status == 403
    assert send_request(server, "GET", "/info", Origin="http://evil.example").status == 403
    assert send_request(server, "GET", "/info", Origin="http://[").status == 403
    here = f"127.0.0.1:{server.port}"
    assert send_request(server, "GET", "/info", Origin=f"http://{here}").status == 200


def test_token_is_required(frame):
    body = {"image": frame.tolist(), "instruction": INSTRUCTION}
    with ServerThread(build_policy(), token=TOKEN) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            reply = send_request(server, body=body, **headers)
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert send_request(server, body=b"x" * 2**20).status == 401  # the reply arrives before the body is sent
        assert send_request(server, body=body, Authorization=f"Bearer {TOKEN}").status == 200
        assert send_request(server, "GET", "/healthz").status == 200
        for path in ("/info", "/metrics", "/openapi.json"):
            assert send_request(server, "GET", path).status == 401
        assert rejected_websocket_status(server) == 401
        with connect_openpi(server, {"Authorization": f"Api-Key {TOKEN}"}) as (metadata, _):
            assert metadata["action_dim"] == 7


def test_token_file_is_validated(tmp_path, capsys, monkeypatch):
    file = tmp_path / "token"
    assert main(["serve", "--token-file", str(file)]) == 2
    file.write_text("short")
    assert main(["serve", "--token-file", str(file)]) == 2
    assert f"at least {MIN_TOKEN_LENGTH} ASCII characters" in capsys.readouterr().err
    monkeypatch.setenv(TOKEN_VARIABLE, "two words, and no secret")
    assert main(["serve"]) == 2
    assert TOKEN_VARIABLE in capsys.readouterr().err


def test_invalid_options_are_named(capsys, monkeypatch):
    for options in (["--port", "70000"], ["--max-batch-size", "0"], ["--max-queue-size", "-1"], ["--timeout-s", "nan"]):
        assert main(["serve", *options]) == 2
        assert options[0] in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "openvla.serving.app")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--port", "0"]) == 2
    assert "pip install 'openvla[serve]'" in capsys.readouterr().err


def test_client_imports_no_other_module_of_the_package():
    """The file can be copied to a robot."""
    assert imports(REPOSITORY / "serving" / "client.py") == ({"numpy", "PIL"}, set())


def test_not_finite_output_is_no_action(frame):
    policy = build_policy()
    next(policy.policy.model.projector.parameters()).data.fill_(torch.nan)
    with ServerThread(policy) as server:
        reply = send_request(server, body={"image": frame.tolist(), "instruction": INSTRUCTION})
        assert (reply.status, reply.error["code"]) == (422, "no_action")
        assert "not finite, so no action can be trusted. Check weights" in reply.error["message"]
        assert b"openvla_model_failures_total 1.0" in send_request(server, "GET", "/metrics").body


def test_bug_in_the_model_is_a_500_without_internals(frame, caplog, monkeypatch):
    policy = build_policy()
    monkeypatch.setattr(policy.policy.model, "predict_action", lambda **_: {}["a bug"])
    with ServerThread(policy) as server, caplog.at_level(logging.INFO, "openvla.serving"):
        reply = send_request(server, body={"image": frame.tolist(), "instruction": INSTRUCTION})
        assert (reply.status, reply.error["code"]) == (500, None)
        assert reply.error["id"] in reply.error["message"]
        assert "a bug" not in reply.error["message"]
        assert "KeyError" not in reply.error["message"]
        assert f"id {reply.error['id']}" in caplog.text
        assert "KeyError: 'a bug'" in caplog.text
        assert "Traceback" in caplog.text


@pytest.mark.parametrize("method", ["prepare", "predict_action"])
def test_openvla_error_of_the_model_is_a_422_with_its_message(method, frame, caplog, monkeypatch):
    policy = build_policy()

    def reject(*_, **__):
        raise OpenVLAKeyError("no such key; known: a, b")

    monkeypatch.setattr(policy if method == "prepare" else policy.policy.model, method, reject)
    with ServerThread(policy) as server, caplog.at_level(logging.INFO, "openvla.serving"):
        reply = send_request(server, body={"image": frame.tolist(), "instruction": INSTRUCTION})
    assert (reply.status, reply.error["message"]) == (422, "no such key; known: a, b")
    assert reply.error["id"] is reply.error["code"] is None
    assert "Traceback" not in caplog.text


def test_no_action_has_its_own_error_code(frame):
    """Check HTTP, WebSocket and client; with ``constrain_actions`` the same request has an action."""
    policy = build_policy()
    policy.policy.constrain_actions = False  # random weights then give other tokens
    body = {"image": frame.tolist(), "instruction": INSTRUCTION}
    with ServerThread(policy) as server:
        reply = send_request(server, body=body)
        assert (reply.status, reply.error["code"], reply.error["field"]) == (422, "no_action", None)
        message = reply.error["message"]
        assert re.match(r"\d of 7 predicted tokens are not action tokens, so this is no action", message)
        assert "constrain_actions" in message
        with connect_openpi(server) as (_, infer):
            assert infer({"observation/image": frame, "prompt": INSTRUCTION}) == f"no_action: {message}"
            frames = {"observation/image": frame, "prompt": INSTRUCTION, "constrain_actions": True}
            constrained = infer(frames)["actions"][0]
        with pytest.raises(NoActionPredictedError) as raised:
            PolicyClient(server.url).act(frame, INSTRUCTION)
        assert (raised.value.code, raised.value.status) == ("no_action", 422)
        assert message in str(raised.value)
        policy.policy.constrain_actions = True
        expected_action = predict_directly(server.policy, frame).tolist()
        policy.policy.constrain_actions = False
        assert constrained.tolist() == expected_action
        assert PolicyClient(server.url, constrain_actions=True).act(frame, INSTRUCTION).tolist() == expected_action
        details = send_request(server, body={**body, "constrain_actions": True, "details": True}).json
        assert (details["actions"], details["constrain_actions"]) == (expected_action, True)


def test_requests_of_many_robots_share_a_batch(server, frame):
    def request_action(index):
        body = {"image": np.roll(frame, index).tolist(), "instruction": f"go {index}", "details": True}
        return send_request(server, body=body).json

    server.policy.gate.clear()
    first_thread, first_reply = start_threads(lambda: request_action(0))
    server.wait_until_all_started()
    threads, replies = start_threads(*(lambda index=index: request_action(index) for index in range(1, 7)))
    server.wait_until_prepared(7)
    release(server, first_thread + threads)
    replies = first_reply + replies
    assert [reply["batch"] for reply in replies] == [1] + [6] * 6
    for index, reply in enumerate(replies):
        expected_action = predict_directly(server.policy, np.roll(frame, index), f"go {index}")
        assert reply["actions"] == expected_action.tolist()


def send_while_busy(server, *bodies):
    """Send requests one after the other while the model waits; return the threads and their lists of replies."""
    server.policy.gate.clear()
    threads, replies = [], []
    for body in bodies:
        before = newest(server.queue)
        thread, reply = start_threads(lambda body=body: send_request(server, body=body))
        threads, replies = threads + thread, [*replies, reply]
        wait_until(lambda before=before: newest(server.queue) > before)
    return threads, replies


def newest(queue):
    """Return the number of the last request; an older one may have been dropped for it."""
    return max(list(queue._entries), default=-1)


def release(server, threads):
    """Let the model predict, and wait for the replies."""
    server.policy.gate.set()
    for thread in threads:
        thread.join()


def test_full_queue_replies_with_retry_after(small):
    threads, replies = send_while_busy(small, VALID_REQUEST, VALID_REQUEST)
    refused = send_request(small, body=VALID_REQUEST)
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    assert send_request(small, "GET", "/healthz").json["waiting"] == 2
    release(small, threads)
    assert [reply[0].status for reply in replies] == [200, 200]


def test_deadline_of_a_request(small):
    threads, replies = send_while_busy(small, VALID_REQUEST)
    started = time.monotonic()
    late = send_request(small, body={**VALID_REQUEST, "deadline_ms": 100})
    assert late.status == 504
    assert "deadline of 100 ms" in late.error["message"]
    assert time.monotonic() - started < LIMITS.timeout_s / 2  # its own, not the one of the server
    release(small, threads)
    assert replies[0][0].status == 200
    assert send_request(small, body=VALID_REQUEST).json == replies[0][0].json


def test_latest_only_drops_the_older_frame():
    with ServerThread(build_policy(Limits(max_queue_size=8))) as server:
        mine = {**VALID_REQUEST, "client_id": "arm", "latest_only": True}
        threads, replies = send_while_busy(server, VALID_REQUEST)
        server.wait_until_all_started()
        more, rest = send_while_busy(
            server,
            mine,
            {**VALID_REQUEST, "client_id": "other", "latest_only": True},
            {**VALID_REQUEST, "client_id": "arm"},
        )
        more[0].join()  # replied to at once, while the model is still busy
        assert rest[0][0].status == 409
        assert "A newer frame of client 'arm'" in rest[0][0].error["message"]
        release(server, threads + more)
        assert [reply[0].status for reply in replies + rest] == [200, 409, 200, 200]


def test_unexpected_error_is_logged_under_an_id(small, caplog, monkeypatch):
    monkeypatch.setattr(small.policy, "prepare", lambda request: 1 / 0)
    reply = send_request(small, body=VALID_REQUEST)
    assert reply.status == 500
    assert reply.error["id"] in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert "ZeroDivisionError" not in reply.error["message"]


def test_metrics(server):
    send_request(server, body={})
    send_request(server, body=b" " * (LIMITS.body_bytes + 1))
    text = send_request(server, "GET", "/metrics").body.decode()
    assert 'openvla_requests_total{route="/act",status="422"}' in text
    assert 'openvla_requests_total{route="guard",status="413"}' in text
    assert "openvla_waiting_requests 0.0" in text
    assert "openvla_batch_rows_bucket" in text
    assert "python_gc" not in text  # a registry of its own


def test_page_may_run_only_its_own_script(server, tmp_path, monkeypatch):
    from openvla.serving import app as serve_app

    monkeypatch.setattr(serve_app, "PAGE", tmp_path / "page.html")
    assert send_request(server, "GET", "/").status == 404
    (tmp_path / "page.html").write_text("<style>p{}</style><p><script>let a=1</script>")
    reply = send_request(server, "GET", "/")
    policy = reply.headers["content-security-policy"]
    assert reply.status == 200
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def test_sigterm_completes_the_accepted_requests(frame):
    """Meanwhile new requests get a 503, and the process ends with status 0."""
    policy = build_policy()
    policy.gate = multiprocessing.get_context("fork").Event()
    expected_action = predict_directly(policy, frame).tolist()
    server = ServerProcess(policy)
    body = {"image": frame.tolist(), "instruction": INSTRUCTION}
    threads, replies = start_threads(*[lambda: send_request(server, body=body)] * 24)
    wait_until(lambda: send_request(server, "GET", "/healthz").json["waiting"] == 24)
    os.kill(server.process.pid, signal.SIGTERM)
    wait_until(lambda: send_request(server, "GET", "/healthz").status == 503)
    assert send_request(server, "GET", "/healthz").json["status"] == "draining"
    refused = send_request(server, body=body)
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    policy.gate.set()
    for thread in threads:
        thread.join()
    assert [reply.json for reply in replies] == [expected_action] * 24
    server.process.join(20)
    assert server.process.exitcode == 0
