"""The policy server: every client's format, what it refuses, its queue, its end."""

import ast
import base64
import io
import json
import logging
import os
import signal
import socket
import struct
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from openvla import PLATFORMS
from openvla.__main__ import main
from openvla.serve import SHORTEST_TOKEN, TOKEN_VARIABLE, Limits
from PIL import Image
from reference import REPOSITORY
from test_house import imports

for package in ("fastapi", "uvicorn", "msgpack", "websockets", "prometheus_client"):
    pytest.importorskip(package)

from openvla import served_policy  # noqa: E402
from openvla.serve_requests import read_json  # noqa: E402
from serving import LIMITS, STATISTICS, InProcess, InThread, ask, embedded, in_threads, until  # noqa: E402

INSTRUCTION = "open the drawer"
STATE = np.linspace(-1, 1, 8)
TOKEN = "a secret of twenty-two"[:22].replace(" ", "-")
OFT = {**PLATFORMS["libero"], "parallel_decoding": True, "action_head": "l1", "norm_stats": {"lab": STATISTICS}}


@pytest.fixture(scope="module")
def server():
    with InThread(embedded()) as server:
        yield server


@pytest.fixture(scope="module")
def chunks():
    """Three cameras, as ALOHA's, and a state."""
    with InThread(embedded(num_images_in_input=3, **OFT)) as server:
        yield server


@pytest.fixture
def frame():
    return np.random.RandomState(0).randint(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def small():
    """One server with room for two requests, whose answers wait for ``gate``."""
    with InThread(embedded(Limits(waiting=2))) as server:
        yield server


def encoded(array):
    array = np.asarray(array)
    return {"__numpy__": base64.b64encode(array.tobytes()).decode(), "dtype": array.dtype.str, "shape": array.shape}


def picture(image, form="PNG"):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def expected(server, images, instruction=INSTRUCTION, state=None):
    """What the model itself says."""
    served = getattr(server, "served", server)
    inputs = served.policy.processor(instruction=instruction, images=images)
    return served.policy.model.predict_action(**inputs, proprio=state, constrain_actions=served.constrain_actions)


def test_clients_of_openvlas_server(server, frame):
    json_numpy = pytest.importorskip("json_numpy")
    wanted = expected(server, frame).tolist()
    body = json_numpy.dumps({"image": frame, "instruction": INSTRUCTION, "unnorm_key": "untrained"})
    for headers in ({}, {"Content_Type": "application/json"}, {"Content_Type": "application/x-www-form-urlencoded"}):
        reply = ask(server, body=body.encode(), **headers)
        action = json_numpy.loads(reply.body)
        assert (reply.status, action.dtype, action.tolist()) == (200, np.float64, wanted)
    double = ask(server, body={"encoded": body})
    assert json_numpy.loads(double.json).tolist() == wanted


def test_clients_of_ofts_server(chunks, frame):
    json_numpy = pytest.importorskip("json_numpy")
    left, right = frame[::-1], 255 - frame
    observation = {"full_image": frame, "left_wrist_image": left, "right_wrist_image": right, "state": STATE}
    wanted = expected(chunks, [frame, left, right], state=STATE)
    reply = ask(chunks, body=json_numpy.dumps({**observation, "instruction": INSTRUCTION}).encode())
    actions = json_numpy.loads(reply.body)
    assert isinstance(actions, list)
    assert np.array_equal(np.stack(actions), wanted)
    assert wanted.shape == (8, 7)
    # Wrist cameras count in the order sent, as there.
    swapped = {**observation, "right_wrist_image": left, "left_wrist_image": right}
    reply = ask(chunks, body=json_numpy.dumps({**swapped, "instruction": INSTRUCTION}).encode())
    assert np.array_equal(json_numpy.loads(reply.body), expected(chunks, [frame, right, left], state=STATE))


def test_one_action_for_ofts_fields_is_a_list_of_one(server, frame):
    reply = ask(server, body={"full_image": frame.tolist(), "instruction": INSTRUCTION})
    assert reply.json == [expected(server, frame).tolist()]


def test_plain_json(server, chunks, frame):
    wanted = expected(server, frame).tolist()
    for image in (picture(frame), "data:image/png;base64," + picture(frame), frame.tolist()):
        assert ask(server, body={"image": image, "instruction": INSTRUCTION}).json == wanted
    jpeg = picture(frame, "JPEG")
    decoded = Image.open(io.BytesIO(base64.b64decode(jpeg)))
    assert ask(server, body={"image": jpeg, "instruction": INSTRUCTION}).json == expected(server, decoded).tolist()
    grey = frame[:, :, 0]
    assert ask(server, body={"image": grey.tolist(), "instruction": "x"}).json == expected(server, grey, "x").tolist()
    images = [frame, frame[::-1], 255 - frame]
    for sent in ([picture(image) for image in images], [image.tolist() for image in images]):
        reply = ask(chunks, body={"image": sent, "instruction": INSTRUCTION, "state": STATE.tolist()})
        assert reply.json == expected(chunks, images, state=STATE).tolist()


def test_details(server, chunks, frame):
    body = {"image": picture(frame), "instruction": INSTRUCTION, "details": True}
    details = ask(server, body=body).json
    inputs = server.served.policy.processor(instruction=INSTRUCTION, images=frame)
    output = server.served.policy.model.predict_action(**inputs, return_dict=True, constrain_actions=True)
    for name in ("actions", "normalized_actions", "token_ids", "bin_probabilities", "entropy"):
        assert details[name] == output[name].tolist()
    assert details["gripper"] == output.actions[-1]
    assert details["names"][-1] == "gripper"
    assert details["unnorm_key"] == "untrained"
    assert details["latency_ms"] >= details["model_ms"] > 0
    chunk = ask(chunks, body={**body, "image": [picture(frame)] * 3, "state": STATE.tolist()}).json
    assert np.shape(chunk["actions"]) == (8, 7)
    assert chunk["gripper"] == [action[-1] for action in chunk["actions"]]
    assert chunk["token_ids"] is chunk["bin_probabilities"] is chunk["entropy"] is None


def test_info(server, chunks):
    info = ask(server, "GET", "/info").json
    dataset = info["unnorm_keys"][info["default_unnorm_key"]]
    assert dataset["low"] == [-1.0] * 7
    assert dataset["names"][:2] == ["dx", "dy"]
    assert (info["action_dim"], info["chunk_length"], info["cameras"], info["proprio_dim"]) == (7, 1, 1, None)
    assert info["limits"]["body_bytes"] == LIMITS.body_bytes
    info = ask(chunks, "GET", "/info").json
    assert (info["answer"], info["chunk_length"], info["cameras"], info["proprio_dim"]) == ("l1", 8, 3, 8)
    assert info["unnorm_keys"]["lab"]["high"][0] == pytest.approx(0.5)
    assert info["limits"]["batch"] == 1  # rounding would reach a continuous head's numbers


GOOD = {"image": [[[0, 0, 0]] * 2] * 2, "instruction": "go"}
FOUR = np.zeros((2, 2, 3), np.float32)


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"image": "/etc/passwd"}, "image", "paths and URLs are never opened"),
        ({"image": "http://127.0.0.1/a.png"}, "image", "paths and URLs are never opened"),
        ({"image": "file:///etc/passwd"}, "image", "paths and URLs are never opened"),
        ({"image": "data:image/png,abc"}, "image", "a data URL must be data:image/png;base64"),
        ({"image": base64.b64encode(b"GIF89a" * 9).decode()}, "image", "must be base64 of a PNG or JPEG"),
        ({"image": picture(np.zeros((8, 8, 3), np.uint8))[:60]}, "image", "must be base64 of a PNG or JPEG"),
        ({"image": picture(Image.new("I;16", (4, 4)))}, "image", "a PNG of mode I;16; send 8-bit"),
        ({"image": picture(Image.new("CMYK", (4, 4)), "JPEG")}, "image", "a JPEG of mode CMYK"),
        ({"image": 5}, "image", "must be base64 of a PNG or JPEG"),
        ({"image": None}, "image", "must be base64 of a PNG or JPEG"),
        ({"image": []}, "image", "must be base64 of a PNG or JPEG"),
        ({"image": [[[0.5, 1, 1]]]}, "image", "whole numbers 0 to 255"),
        ({"image": [[[0, 0, 256]]]}, "image", "whole numbers 0 to 255"),
        ({"image": [[[0, 0, True]]]}, "image", "whole numbers 0 to 255"),
        ({"image": [[[0, 0, 0]], [[0, 0]]]}, "image", "rows must have equal lengths"),
        ({"image": [[[0, 0]] * 4] * 4}, "image", r"\(4, 4, 2\)"),
        ({"image": [[[0, 0, 0]] * 40]}, "image", "a strip of 40 x 1"),
        ({"image": encoded(FOUR + np.nan)}, "image", "must lie in"),
        ({"image": encoded(FOUR + np.inf)}, "image", "must lie in"),
        ({"image": encoded(FOUR + 2)}, "image", "must lie in"),
        ({"image": encoded(FOUR.astype(np.int64))}, "image", "must be uint8, or float"),
        ({"image": encoded(np.zeros((0, 4, 3), np.uint8))}, "image", "no pixels"),
        ({"image": encoded(np.zeros(12, np.uint8))}, "image", r"must have shape \(height, width, 3\), got \(12,\)"),
        ({"image": {**encoded(FOUR), "dtype": "|O"}}, "image", r"dtype must be .* got '\|O'"),
        ({"image": {**encoded(FOUR), "dtype": "|S4"}}, "image", "dtype must be"),
        ({"image": {**encoded(FOUR), "dtype": [["a", "<f4"]]}}, "image", "dtype must be"),
        ({"image": {**encoded(FOUR), "shape": [2**40, 2**40, 3]}}, "image", "48 bytes are no array"),
        ({"image": {**encoded(FOUR), "shape": [-2, -2, 3]}}, "image", "shape must be up to four sizes"),
        ({"image": {**encoded(FOUR), "__numpy__": "%%%"}}, "image", "must be base64"),
        ({"image": [GOOD["image"]] * 2}, "image", "takes 1 camera images a moment, got 2"),
        ({"image": [GOOD["image"]] * 17}, "image", "holds 17 images"),
        ({"wrist_image": GOOD["image"]}, "image", "takes 1 camera images a moment, got 2"),
        ({"full_image": GOOD["image"]}, "full_image", "image and full_image mean the same"),
        ({"instruction": "  "}, "instruction", "must be text"),
        ({"instruction": 7}, "instruction", "must be text"),
        ({"instruction": "x" * 1001}, "instruction", "1001 characters; at most 1000"),
        ({"instruction": "\ud800"}, "instruction", "surrogate"),
        ({"prompt": "go"}, "prompt", "instruction and prompt mean the same"),
        ({"unorm_key": "untrained"}, "unorm_key", "Did you mean 'unnorm_key'"),
        ({"unnorm_key": "untraine"}, "unnorm_key", "Did you mean 'untrained'"),
        ({"unnorm_key": 3}, "unnorm_key", "must be text"),
        ({"details": "yes"}, "details", "true or false"),
        ({"deadline_ms": 0}, "deadline_ms", "above 0"),
        ({"latest_only": True}, "client_id", "latest_only needs client_id"),
        ({"state": [0.0] * 8}, "state", "trained without the robot's state"),
        ({"proprio": [0.0, "1"]}, "proprio", "must be a list of numbers"),
        ({"state": [[0.0]]}, "state", "must be a list of numbers"),
        ({"state": encoded([0.0, np.nan])}, "state", "must be finite"),
        ({"state": [1e999]}, None, "Infinity"),
        ({"state": [10**400]}, "state", "beyond float64"),
    ],
)
def test_a_wrong_field_is_named(server, change, field, message):
    reply = ask(server, body={**GOOD, **change})
    assert 400 <= reply.status < 500
    assert reply.error["field"] == field
    with pytest.raises(ValueError, match=message):
        raise ValueError(reply.error["message"])


@pytest.mark.parametrize("name", ["image", "instruction"])
def test_a_missing_field_is_named(server, name):
    reply = ask(server, body={other: value for other, value in GOOD.items() if other != name})
    assert (reply.status, reply.error["field"]) == (422, name)


@pytest.mark.parametrize(
    "body", [b"", b"\xff\xfe", b"nonsense", b'{"image": NaN}', b"[" * 100000, b'{"encoded": 5}', b'{"encoded": "{"}']
)
def test_what_is_no_json(server, body):
    assert ask(server, body=body).status in (400, 422)
    assert ask(server, body=b"[]").error["message"] == "The body must be a JSON object, got list."


def test_a_states_faults(chunks, frame):
    body = {"image": [frame.tolist()] * 3, "instruction": INSTRUCTION}
    assert "needs the robot's state" in ask(chunks, body=body).error["message"]
    short = ask(chunks, body={**body, "state": [0.0] * 7})
    assert (short.error["field"], short.error["message"]) == ("state", "state must hold 8 numbers, got 7.")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_100_megapixels_is_refused_by_its_header(server):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 10000, 10000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    started = time.process_time()
    reply = ask(server, body={"image": base64.b64encode(bomb).decode(), "instruction": "go"})
    assert (reply.status, reply.error["field"]) == (413, "image")
    assert "10000 x 10000 pixels; at most 4096" in reply.error["message"]
    assert time.process_time() - started < 1


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


def test_a_flood_is_held_off(frame):
    with InThread(embedded(Limits(connections=4, reading_bytes=1000, header_seconds=1))) as server:
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
    assert f"at least {SHORTEST_TOKEN} ASCII characters" in capsys.readouterr().err
    monkeypatch.setenv(TOKEN_VARIABLE, "two words, and no secret")
    assert main(["serve"]) == 2
    assert TOKEN_VARIABLE in capsys.readouterr().err


def test_wrong_options(capsys, monkeypatch):
    for options in (["--port", "70000"], ["--batch", "0"], ["--waiting", "-1"], ["--deadline", "nan"]):
        assert main(["serve", *options]) == 2
        assert options[0] in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err
    assert main(["serve", "--bits", "4", "--port", "0"]) == 2
    monkeypatch.delitem(sys.modules, "openvla.serve_app")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--port", "0"]) == 2
    assert "pip install 'openvla[serve]'" in capsys.readouterr().err


def test_the_package_does_not_import_the_server():
    """Nothing that ``import openvla`` or the command imports needs the extra."""
    seen, left = set(), ["__init__", "__main__"]
    while left:
        room = left.pop()
        seen.add(room)
        tree = ast.parse((REPOSITORY / f"{room}.py").read_text(encoding="utf-8"))
        relative = imports(REPOSITORY / f"{room}.py")[1] - {""}
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.module for a in n.names}
        left += [name for name in (relative | names) - seen if (REPOSITORY / f"{name}.py").is_file()]
    assert "policy_client" in seen
    assert not {"serve_app", "serve_guard", "serve_requests", "serve_metrics"} & seen
    assert imports(REPOSITORY / "policy_client.py") == ({"numpy", "PIL"}, set())  # it may be copied to a robot


def prepared(served, frame, instruction):
    body = json.dumps({"image": np.roll(frame, len(instruction)).tolist(), "instruction": instruction, "details": True})
    return served.prepare(read_json(body.encode(), LIMITS))


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 8), (torch.bfloat16, 3)])
def test_a_batch_has_the_tokens_of_each_row_alone(frame, dtype, count):
    """Prompts of one length and of several."""
    served = embedded()
    served.policy.model.to(dtype)
    rows = [prepared(served, frame, "go " + "on " * (index % 4)) for index in range(count)]
    alone_of_all = [served.answer([row])[0] for row in rows]
    for some in (slice(None), slice(0, None, 4), slice(0, 3)):
        batch, alone = rows[some], alone_of_all[some]
        together = served.answer(batch)
        assert [answer.output.token_ids.tolist() for answer in together] == [
            answer.output.token_ids.tolist() for answer in alone
        ]
        assert [answer.output.actions.tolist() for answer in together] == [
            answer.output.actions.tolist() for answer in alone
        ]
        assert any(answer.rows == len(batch) for answer in together) or dtype is torch.bfloat16


def test_a_close_call_is_answered_again_alone(frame, monkeypatch):
    served = embedded()
    rows = [prepared(served, frame, f"go {index}") for index in range(3)]
    output = served.answer(rows)[0].output
    second, first = np.sort(output.bin_probabilities, axis=-1)[:, -2:].T
    closest = np.log(first / second).min()
    for limit, again in ((closest * 0.99, False), (closest * 1.01, True)):
        monkeypatch.setitem(served_policy.CLOSE_CALL, torch.float32, limit)
        assert served.answer(rows)[0].again is again


def test_one_bad_row_does_not_hurt_the_others(frame, caplog):
    served = embedded()
    good, bad = (prepared(served, frame, text) for text in ("go", "on"))
    bad.inputs["pixel_values"] = bad.inputs["pixel_values"] * torch.nan
    answer, failed = served.answer([good, bad])
    assert answer.output.actions.tolist() == served.answer([good])[0].output.actions.tolist()
    assert isinstance(failed, served_policy.AnswerError)
    assert failed.id in caplog.text


def test_what_is_not_finite_is_an_error_with_an_id(frame, caplog):
    served = embedded()
    next(served.policy.model.projector.parameters()).data.fill_(torch.nan)
    with InThread(served) as server, caplog.at_level(logging.INFO, "openvla.serve"):
        reply = ask(server, body={"image": frame.tolist(), "instruction": INSTRUCTION})
        assert reply.status == 500
        assert reply.error["id"] in reply.error["message"]
        assert f"id {reply.error['id']}" in caplog.text
        assert "not finite" in caplog.text
        assert b"openvla_model_failures_total 1.0" in ask(server, "GET", "/metrics").body


def test_many_robots_share_a_batch(server, frame):
    def asking(index):
        body = {"image": np.roll(frame, index).tolist(), "instruction": f"go {'on ' * index}", "details": True}
        return ask(server, body=body).json

    server.served.gate.clear()
    threads, replies = in_threads(*(lambda index=index: asking(index) for index in range(7)))
    server.waiting(7)
    server.served.gate.set()
    for thread in threads:
        thread.join()
    assert max(reply["batch"] for reply in replies) >= 6  # the first may have begun alone
    for index, reply in enumerate(replies):
        wanted = expected(server, np.roll(frame, index), f"go {'on ' * index}")
        assert reply["actions"] == wanted.tolist()


def held(small, *bodies):
    """Replies to requests that are made one after the other while the model is held back."""
    small.served.gate.clear()
    threads, replies, count = [], [], len(small.shared.queue)
    for body in bodies:
        count += 1
        thread, reply = in_threads(lambda body=body: ask(small, body=body))
        threads, replies = threads + thread, [*replies, reply]
        until(lambda count=count: len(small.shared.queue) == count)
    return threads, replies


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
    assert time.monotonic() - started < 2
    released(small, threads)
    assert replies[0][0].status == 200
    assert ask(small, body=GOOD).json == replies[0][0].json


def test_a_stale_frame_is_dropped_for_a_newer_one():
    with InThread(embedded(Limits(waiting=8))) as server:
        mine = {**GOOD, "client_id": "arm", "latest_only": True}
        threads, replies = held(server, GOOD)  # the model is busy with this one
        server.waiting(1)
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
    text = ask(server, "GET", "/metrics").body.decode()
    assert 'openvla_requests_total{route="/act",status="422"}' in text
    assert "openvla_waiting_requests 0.0" in text
    assert "openvla_batch_rows_bucket" in text
    assert "python_gc" not in text  # a registry of its own


def test_the_page_may_run_its_own_script_only(server, tmp_path, monkeypatch):
    from openvla import serve_app

    monkeypatch.setattr(serve_app, "PAGE", tmp_path / "page.html")
    assert ask(server, "GET", "/").status == 404
    (tmp_path / "page.html").write_text("<style>p{}</style><p><script>let a=1</script>")
    reply = ask(server, "GET", "/")
    policy = reply.headers["content-security-policy"]
    assert reply.status == 200
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def openpi(server, headers=None):
    """A session of openpi's protocol: the metadata, and a function that sends a frame and gives the reply."""
    import contextlib

    import msgpack
    from websockets.sync.client import connect

    def packed(value):
        data = {b"__ndarray__": True, b"data": value.tobytes()}
        return {**data, b"dtype": value.dtype.str, b"shape": value.shape}

    def unpacked(value):
        if b"__ndarray__" in value:
            return np.ndarray(value[b"shape"], value[b"dtype"], value[b"data"])
        return value

    @contextlib.contextmanager
    def session():
        with connect(f"ws://127.0.0.1:{server.port}", compression=None, additional_headers=headers) as socket:

            def infer(frame):
                socket.send(frame if isinstance(frame, (bytes, str)) else msgpack.packb(frame, default=packed))
                reply = socket.recv(timeout=20)
                return reply if isinstance(reply, str) else msgpack.unpackb(reply, object_hook=unpacked)

            yield msgpack.unpackb(socket.recv(timeout=20)), infer

    return session()


def refused_by_websocket(server, **headers):
    from websockets.exceptions import InvalidStatus

    with pytest.raises(InvalidStatus) as refused, openpi(server, headers):
        pass
    return refused.value.response.status_code


def test_openpis_protocol(server, chunks, frame):
    with openpi(server) as (metadata, infer):
        assert metadata == ask(server, "GET", "/info").json
        reply = infer({"observation/image": frame, "prompt": INSTRUCTION})
        assert np.array_equal(reply["actions"], expected(server, frame)[None])
        assert reply["server_timing"]["infer_ms"] > 0
        # An error is text, and the connection goes on.
        assert infer({"prompt": INSTRUCTION}) == "image is missing (or full_image)."
        assert "Unknown field 'observation/joint'" in infer({**GOOD, "observation/joint": 1})
        assert "must be msgpack" in infer(b"\xc1")
        assert "got text" in infer("hello")
        assert "dtype must be" in infer({"image": {b"__ndarray__": 1, b"data": b"", b"dtype": "|O", b"shape": []}})
        assert infer({"image": frame, "prompt": INSTRUCTION})["server_timing"]["prev_total_ms"] > 0
    state = STATE.astype(np.float32)
    with openpi(chunks) as (metadata, infer):
        sent = {
            "observation/image": frame,
            "observation/left_wrist_image": frame,
            "observation/wrist_image_right": frame,
        }
        reply = infer({**sent, "observation/state": state, "prompt": INSTRUCTION})
        assert np.array_equal(reply["actions"], expected(chunks, [frame] * 3, state=state))
    assert refused_by_websocket(server, Origin="http://evil.example") == 403


def test_sigterm_answers_all_that_was_accepted(frame):
    """Under load; meanwhile new requests are told to go elsewhere, and the process ends with status 0."""
    served = embedded()
    served.pause = 0.3
    wanted = expected(served, frame).tolist()
    server = InProcess(served)
    body = {"image": frame.tolist(), "instruction": INSTRUCTION}
    threads, replies = in_threads(*[lambda: ask(server, body=body)] * 24)
    until(lambda: ask(server, "GET", "/healthz").json["waiting"] >= 20)
    os.kill(server.process.pid, signal.SIGTERM)
    until(lambda: ask(server, "GET", "/healthz").status == 503)
    assert ask(server, "GET", "/healthz").json["status"] == "draining"
    refused = ask(server, body=body)
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    for thread in threads:
        thread.join()
    answered = [reply.json for reply in replies if reply.status == 200]
    assert answered == [wanted] * len(answered)
    assert len(answered) >= 20
    assert {reply.status for reply in replies} <= {200, 503}
    server.process.join(20)
    assert server.process.exitcode == 0
