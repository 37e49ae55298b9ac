"""The policy server: who may ask and how slowly, its queue, its page, its command, its end."""

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
from openvla.serving.cli import MIN_TOKEN_LENGTH, TOKEN_VARIABLE, Limits
from openvla.serving.client import NoActionPredictedError
from reference import REPOSITORY
from test_house import imports

for package in ("fastapi", "uvicorn", "msgpack", "websockets", "prometheus_client"):
    pytest.importorskip(package)

from servers import (  # noqa: E402
    GOOD,
    INSTRUCTION,
    LIMITS,
    InProcess,
    InThread,
    ask,
    embedded,
    expected,
    in_threads,
    openpi,
    refused_by_websocket,
    until,
)

TOKEN = "a-secret-of-twenty-two"


@pytest.fixture(scope="module")
def small():
    """One server with room for two requests, whose answers wait for ``gate``."""
    with InThread(embedded(Limits(max_queue_size=2))) as server:
        yield server


def test_a_body_that_is_too_large(server):
    assert ask(server, body=b" " * (LIMITS.body_bytes + 1)).status == 413
    sent = iter([b" " * 2**20] * 8)
    assert ask(server, body=sent, Transfer_Encoding="chunked").status == 413


def raw(server, data, seconds=5):
    """Send bytes, then wait for what comes until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(data)
        got = b""
        while chunk := connection.recv(65536):
            got += chunk
        return got


def test_slow_clients_are_given_up(server):
    assert raw(server, b"POST /act HT") == b""  # a head that never ends
    assert raw(server, b"") == b""  # none at all
    got = raw(server, b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert got.startswith(b"HTTP/1.1 408")
    first = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert raw(server, first + b"GET /he").count(b"HTTP/1.1 200") == 1  # the second head never ends
    assert raw(server, b"\x00\x01garbage\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_flood_is_entries_off(frame):
    with InThread(embedded(Limits(connections=4, max_inflight_bytes=1000, header_seconds=1))) as server:
        body = {"image": frame.tolist(), "instruction": INSTRUCTION}
        flooded = ask(server, body=body)
        assert (flooded.status, flooded.headers["retry-after"]) == (503, "1")
        assert ask(server, body=b"{}").status == 422  # the bytes are given back
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        until(lambda: len(server.server.server_state.connections) >= 4)
        with pytest.raises(OSError, match="reset|closed"):
            ask(server, "GET", "/healthz")
        until(lambda: not server.server.server_state.connections)
        assert ask(server, "GET", "/healthz").status == 200
        for connection in silent:
            connection.close()


def test_only_its_own_pages_and_names(server):
    assert ask(server, "GET", "/info", Host="evil.example").status == 403
    assert ask(server, "GET", "/info", Origin="http://evil.example").status == 403
    assert ask(server, "GET", "/info", Origin="http://[").status == 403
    here = f"127.0.0.1:{server.port}"
    assert ask(server, "GET", "/info", Origin=f"http://{here}").status == 200


def test_a_token(frame):
    body = {"image": frame.tolist(), "instruction": INSTRUCTION}
    with InThread(embedded(), token=TOKEN) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            reply = ask(server, body=body, **headers)
            assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert ask(server, body=b"x" * 2**20).status == 401  # told, though it was still sending
        assert ask(server, body=body, Authorization=f"Bearer {TOKEN}").status == 200
        assert ask(server, "GET", "/healthz").status == 200
        for path in ("/info", "/metrics", "/openapi.json"):
            assert ask(server, "GET", path).status == 401
        assert refused_by_websocket(server) == 401
        with openpi(server, {"Authorization": f"Api-Key {TOKEN}"}) as (metadata, _):
            assert metadata["action_dim"] == 7


def test_a_tokens_file(tmp_path, capsys, monkeypatch):
    file = tmp_path / "token"
    assert main(["serve", "--token-file", str(file)]) == 2
    file.write_text("short")
    assert main(["serve", "--token-file", str(file)]) == 2
    assert f"at least {MIN_TOKEN_LENGTH} ASCII characters" in capsys.readouterr().err
    monkeypatch.setenv(TOKEN_VARIABLE, "two words, and no secret")
    assert main(["serve"]) == 2
    assert TOKEN_VARIABLE in capsys.readouterr().err


def test_wrong_options(capsys, monkeypatch):
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


def test_the_client_can_be_copied_to_a_robot():
    """It imports no other module of the package."""
    assert imports(REPOSITORY / "serving" / "client.py") == ({"numpy", "PIL"}, set())


def test_what_is_not_finite_is_no_action(frame):
    served = embedded()
    next(served.policy.model.projector.parameters()).data.fill_(torch.nan)
    with InThread(served) as server:
        reply = ask(server, body={"image": frame.tolist(), "instruction": INSTRUCTION})
        assert (reply.status, reply.error["code"]) == (422, "no_action")
        assert "not finite, so no action can be trusted. Check weights" in reply.error["message"]
        assert b"openvla_model_failures_total 1.0" in ask(server, "GET", "/metrics").body


def test_a_model_that_fails_is_an_error_with_an_id(frame, caplog, monkeypatch):
    served = embedded()
    monkeypatch.setattr(served.policy.model, "predict_action", lambda **_: {}["a bug"])
    with InThread(served) as server, caplog.at_level(logging.INFO, "openvla.serving"):
        reply = ask(server, body={"image": frame.tolist(), "instruction": INSTRUCTION})
        assert (reply.status, reply.error["code"]) == (500, None)
        assert reply.error["id"] in reply.error["message"]
        assert f"id {reply.error['id']}" in caplog.text
        assert "KeyError: 'a bug'" in caplog.text


def test_no_action_is_an_answer_of_its_own(frame):
    """Over HTTP, the websocket and the client; with ``constrain_actions`` the same request has an action."""
    served = embedded()
    served.policy.constrain_actions = False  # random weights then give other tokens
    body = {"image": frame.tolist(), "instruction": INSTRUCTION}
    with InThread(served) as server:
        reply = ask(server, body=body)
        assert (reply.status, reply.error["code"], reply.error["field"]) == (422, "no_action", None)
        said = reply.error["message"]
        assert re.match(r"\d of 7 predicted tokens are not action tokens, so this is no action", said)
        assert "constrain_actions" in said
        with openpi(server) as (_, infer):
            assert infer({"observation/image": frame, "prompt": INSTRUCTION}) == f"no_action: {said}"
            frames = {"observation/image": frame, "prompt": INSTRUCTION, "constrain_actions": True}
            constrained = infer(frames)["actions"][0]
        with pytest.raises(NoActionPredictedError) as raised:
            PolicyClient(server.url).act(frame, INSTRUCTION)
        assert (raised.value.code, raised.value.status) == ("no_action", 422)
        assert said in str(raised.value)
        served.policy.constrain_actions = True
        wanted = expected(server, frame).tolist()
        served.policy.constrain_actions = False
        assert constrained.tolist() == wanted
        assert PolicyClient(server.url, constrain_actions=True).act(frame, INSTRUCTION).tolist() == wanted
        details = ask(server, body={**body, "constrain_actions": True, "details": True}).json
        assert (details["actions"], details["constrain_actions"]) == (wanted, True)


def test_many_robots_share_a_batch(server, frame):
    def asking(index):
        body = {"image": np.roll(frame, index).tolist(), "instruction": f"go {index}", "details": True}
        return ask(server, body=body).json

    server.served.gate.clear()
    first_thread, first_reply = in_threads(lambda: asking(0))
    server.busy()
    threads, replies = in_threads(*(lambda index=index: asking(index) for index in range(1, 7)))
    server.waiting(7)
    released(server, first_thread + threads)
    replies = first_reply + replies
    assert [reply["batch"] for reply in replies] == [1] + [6] * 6
    for index, reply in enumerate(replies):
        wanted = expected(server, np.roll(frame, index), f"go {index}")
        assert reply["actions"] == wanted.tolist()


def held(small, *bodies):
    """Replies to requests that are made one after the other while the model is held back."""
    small.served.gate.clear()
    threads, replies = [], []
    for body in bodies:
        before = newest(small.shared.queue)
        thread, reply = in_threads(lambda body=body: ask(small, body=body))
        threads, replies = threads + thread, [*replies, reply]
        until(lambda before=before: newest(small.shared.queue) > before)
    return threads, replies


def newest(queue):
    """The number of the request that came last; an older one may have been dropped for it."""
    return max(list(queue._entries), default=-1)


def released(small, threads):
    small.served.gate.set()
    for thread in threads:
        thread.join()


def test_a_full_queue_says_when_to_try_again(small):
    threads, replies = held(small, GOOD, GOOD)
    refused = ask(small, body=GOOD)
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    assert ask(small, "GET", "/healthz").json["waiting"] == 2
    released(small, threads)
    assert [reply[0].status for reply in replies] == [200, 200]


def test_a_deadline(small):
    threads, replies = held(small, GOOD)
    started = time.monotonic()
    late = ask(small, body={**GOOD, "deadline_ms": 100})
    assert late.status == 504
    assert "deadline of 100 ms" in late.error["message"]
    assert time.monotonic() - started < LIMITS.timeout_s / 2  # its own, not the one of the server
    released(small, threads)
    assert replies[0][0].status == 200
    assert ask(small, body=GOOD).json == replies[0][0].json


def test_a_stale_frame_is_dropped_for_a_newer_one():
    with InThread(embedded(Limits(max_queue_size=8))) as server:
        mine = {**GOOD, "client_id": "arm", "latest_only": True}
        threads, replies = held(server, GOOD)
        server.busy()
        more, rest = held(
            server, mine, {**GOOD, "client_id": "other", "latest_only": True}, {**GOOD, "client_id": "arm"}
        )
        more[0].join()  # told at once, while the model is still busy
        assert rest[0][0].status == 409
        assert "A newer frame of client 'arm'" in rest[0][0].error["message"]
        released(server, threads + more)
        assert [reply[0].status for reply in replies + rest] == [200, 409, 200, 200]


def test_an_unexpected_failure_has_an_id(small, caplog, monkeypatch):
    monkeypatch.setattr(small.served, "prepare", lambda request: 1 / 0)
    reply = ask(small, body=GOOD)
    assert reply.status == 500
    assert reply.error["id"] in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert "ZeroDivisionError" not in reply.error["message"]


def test_metrics(server):
    ask(server, body={})
    ask(server, body=b" " * (LIMITS.body_bytes + 1))
    text = ask(server, "GET", "/metrics").body.decode()
    assert 'openvla_requests_total{route="/act",status="422"}' in text
    assert 'openvla_requests_total{route="guard",status="413"}' in text
    assert "openvla_waiting_requests 0.0" in text
    assert "openvla_batch_rows_bucket" in text
    assert "python_gc" not in text  # a registry of its own


def test_the_page_may_run_its_own_script_only(server, tmp_path, monkeypatch):
    from openvla.serving import app as serve_app

    monkeypatch.setattr(serve_app, "PAGE", tmp_path / "page.html")
    assert ask(server, "GET", "/").status == 404
    (tmp_path / "page.html").write_text("<style>p{}</style><p><script>let a=1</script>")
    reply = ask(server, "GET", "/")
    policy = reply.headers["content-security-policy"]
    assert reply.status == 200
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def test_sigterm_answers_all_that_was_accepted(frame):
    """Under load; meanwhile new requests are told to go elsewhere, and the process ends with status 0."""
    served = embedded()
    served.gate = multiprocessing.get_context("fork").Event()
    wanted = expected(served, frame).tolist()
    server = InProcess(served)
    body = {"image": frame.tolist(), "instruction": INSTRUCTION}
    threads, replies = in_threads(*[lambda: ask(server, body=body)] * 24)
    until(lambda: ask(server, "GET", "/healthz").json["waiting"] == 24)
    os.kill(server.process.pid, signal.SIGTERM)
    until(lambda: ask(server, "GET", "/healthz").status == 503)
    assert ask(server, "GET", "/healthz").json["status"] == "draining"
    refused = ask(server, body=body)
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    served.gate.set()
    for thread in threads:
        thread.join()
    assert [reply.json for reply in replies] == [wanted] * 24
    server.process.join(20)
    assert server.process.exitcode == 0
