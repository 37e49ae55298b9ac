"""The formats of the policy server's clients, and what is wrong with a request."""

import base64
import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

for package in ("fastapi", "uvicorn", "msgpack", "websockets", "prometheus_client"):
    pytest.importorskip(package)

from openvla.serving.cli import Limits  # noqa: E402
from openvla.serving.requests import RequestError, parse_msgpack_request  # noqa: E402
from servers import GOOD, INSTRUCTION, STATE, ask, encoded, expected, openpi, picture, refused_by_websocket  # noqa: E402

FOUR = np.zeros((2, 2, 3), np.float32)


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
    sideways = Image.Exif()
    sideways[0x0112] = 6
    photo = picture(np.rot90(frame), exif=sideways.tobytes())  # as of a camera that was turned to its left
    assert ask(server, body={"image": photo, "instruction": INSTRUCTION}).json == wanted
    printed = Image.fromarray(frame).convert("CMYK")
    printed = picture(printed, "JPEG")
    colours = Image.open(io.BytesIO(base64.b64decode(printed))).convert("RGB")
    assert ask(server, body={"image": printed, "instruction": INSTRUCTION}).json == expected(server, colours).tolist()
    jpeg = picture(frame, "JPEG")
    decoded = Image.open(io.BytesIO(base64.b64decode(jpeg)))
    assert ask(server, body={"image": jpeg, "instruction": INSTRUCTION}).json == expected(server, decoded).tolist()
    grey = frame[:, :, 0]
    assert ask(server, body={"image": grey.tolist(), "instruction": "x"}).json == expected(server, grey, "x").tolist()
    images = [frame, frame[::-1], 255 - frame]
    for sent in ([picture(image) for image in images], [image.tolist() for image in images]):
        reply = ask(chunks, body={"image": sent, "instruction": INSTRUCTION, "state": STATE.tolist()})
        assert reply.json == expected(chunks, images, state=STATE).tolist()


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


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"image": "/etc/passwd"}, "image", "paths and URLs are never opened"),
        ({"image": "http://127.0.0.1/a.png"}, "image", "paths and URLs are never opened"),
        ({"image": "file:///etc/passwd"}, "image", "paths and URLs are never opened"),
        ({"image": "data:image/png,abc"}, "image", "a data URL must be data:image/png;base64"),
        ({"image": base64.b64encode(b"GIF89a" * 9).decode()}, "image", "must be base64 of a PNG or JPEG"),
        ({"image": picture(np.zeros((8, 8, 3), np.uint8))[:60]}, "image", "must be base64 of a PNG or JPEG"),
        ({"image": picture(Image.new("I;16", (4, 4)))}, "image", "image: A picture must have 8 bits .* got mode I;16"),
        ({"image": encoded(np.zeros((4, 4, 3), np.uint16))}, "image", "uint8, or float in .* got dtype uint16"),
        ({"image": encoded(np.full((4, 4, 3), 255.0))}, "image", "must lie in .* got values from 255.0 to 255.0"),
        ({"instruction": "What action should the robot take to go?"}, "instruction", "is a whole prompt"),
        ({"instruction": "In: go\nOut:"}, "instruction", "is a whole prompt"),
        ({"constrain_actions": "yes"}, "constrain_actions", "must be true or false"),
        ({"image": [GOOD["image"]] * 2}, "image", "takes 1 camera images a moment, got 2; send as many"),
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


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("instruction", '{"image": [[[1, 2, 3]]], "instruction": "go", "instruction": "stop"}'),
        ("unnorm_key", '{"unnorm_key": "a", "image": [[[1, 2, 3]]], "instruction": "go", "unnorm_key": "b"}'),
        ("shape", '{"image": {"__numpy__": "AAAA", "dtype": "|u1", "shape": [3], "shape": [1, 1, 3]}}'),
    ],
)
def test_a_field_that_is_sent_twice_is_refused(server, name, body):
    for reply in (ask(server, body=body.encode()), ask(server, body={"encoded": body})):
        assert (reply.status, reply.json["error"]["field"]) == (422, name)
        assert reply.json["error"]["message"] == f"A field was sent twice: '{name}'; send it once."


def test_a_field_that_is_packed_twice_is_refused():
    msgpack, limits = pytest.importorskip("msgpack"), Limits()
    twice = b"\x83" + b"".join(map(msgpack.packb, ("prompt", "go", "image", 1, "prompt", "stop")))
    with pytest.raises(RequestError, match="A field was sent twice: 'prompt'"):
        parse_msgpack_request(twice, limits)
