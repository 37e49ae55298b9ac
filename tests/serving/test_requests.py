"""Request formats of the policy server's clients, and the errors for invalid requests."""

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
from servers import (  # noqa: E402
    INSTRUCTION,
    STATE,
    VALID_REQUEST,
    connect_openpi,
    encode_array,
    encode_picture,
    predict_directly,
    rejected_websocket_status,
    send_request,
)

FOUR = np.zeros((2, 2, 3), np.float32)


def test_openvla_client_format(server, frame):
    json_numpy = pytest.importorskip("json_numpy")
    expected_action = predict_directly(server.policy, frame).tolist()
    body = json_numpy.dumps({"image": frame, "instruction": INSTRUCTION, "unnorm_key": "untrained"})
    for headers in ({}, {"Content_Type": "application/json"}, {"Content_Type": "application/x-www-form-urlencoded"}):
        reply = send_request(server, body=body.encode(), **headers)
        action = json_numpy.loads(reply.body)
        assert (reply.status, action.dtype, action.tolist()) == (200, np.float64, expected_action)
    double = send_request(server, body={"encoded": body})
    assert json_numpy.loads(double.json).tolist() == expected_action


def test_oft_client_format(chunks, frame):
    json_numpy = pytest.importorskip("json_numpy")
    left, right = frame[::-1], 255 - frame
    observation = {"full_image": frame, "left_wrist_image": left, "right_wrist_image": right, "state": STATE}
    expected_action = predict_directly(chunks.policy, [frame, left, right], state=STATE)
    reply = send_request(chunks, body=json_numpy.dumps({**observation, "instruction": INSTRUCTION}).encode())
    actions = json_numpy.loads(reply.body)
    assert isinstance(actions, list)
    assert np.array_equal(np.stack(actions), expected_action)
    assert expected_action.shape == (8, 7)
    # Wrist cameras are used in the order sent, as by OpenVLA-OFT's server.
    swapped = {**observation, "right_wrist_image": left, "left_wrist_image": right}
    reply = send_request(chunks, body=json_numpy.dumps({**swapped, "instruction": INSTRUCTION}).encode())
    assert np.array_equal(
        json_numpy.loads(reply.body), predict_directly(chunks.policy, [frame, right, left], state=STATE)
    )


def test_single_action_for_oft_fields_is_a_list(server, frame):
    reply = send_request(server, body={"full_image": frame.tolist(), "instruction": INSTRUCTION})
    assert reply.json == [predict_directly(server.policy, frame).tolist()]


def test_plain_json_format(server, chunks, frame):
    expected_action = predict_directly(server.policy, frame).tolist()
    for image in (encode_picture(frame), "data:image/png;base64," + encode_picture(frame), frame.tolist()):
        assert send_request(server, body={"image": image, "instruction": INSTRUCTION}).json == expected_action
    sideways = Image.Exif()
    sideways[0x0112] = 6
    photo = encode_picture(np.rot90(frame), exif=sideways.tobytes())  # from a camera that was rotated
    assert send_request(server, body={"image": photo, "instruction": INSTRUCTION}).json == expected_action
    printed = Image.fromarray(frame).convert("CMYK")
    printed = encode_picture(printed, "JPEG")
    colours = Image.open(io.BytesIO(base64.b64decode(printed))).convert("RGB")
    assert (
        send_request(server, body={"image": printed, "instruction": INSTRUCTION}).json
        == predict_directly(server.policy, colours).tolist()
    )
    jpeg = encode_picture(frame, "JPEG")
    decoded = Image.open(io.BytesIO(base64.b64decode(jpeg)))
    assert (
        send_request(server, body={"image": jpeg, "instruction": INSTRUCTION}).json
        == predict_directly(server.policy, decoded).tolist()
    )
    grey = frame[:, :, 0]
    assert (
        send_request(server, body={"image": grey.tolist(), "instruction": "x"}).json
        == predict_directly(server.policy, grey, "x").tolist()
    )
    images = [frame, frame[::-1], 255 - frame]
    for sent in ([encode_picture(image) for image in images], [image.tolist() for image in images]):
        reply = send_request(chunks, body={"image": sent, "instruction": INSTRUCTION, "state": STATE.tolist()})
        assert reply.json == predict_directly(chunks.policy, images, state=STATE).tolist()


def test_openpi_protocol(server, chunks, frame):
    with connect_openpi(server) as (metadata, infer):
        assert metadata == send_request(server, "GET", "/info").json
        reply = infer({"observation/image": frame, "prompt": INSTRUCTION})
        assert np.array_equal(reply["actions"], predict_directly(server.policy, frame)[None])
        assert reply["server_timing"]["infer_ms"] > 0
        # An error is text, and the connection stays open.
        assert infer({"prompt": INSTRUCTION}) == "image is missing (or full_image)."
        assert "Unknown field 'observation/joint'" in infer({**VALID_REQUEST, "observation/joint": 1})
        assert "must be msgpack" in infer(b"\xc1")
        assert "got text" in infer("hello")
        assert "dtype must be" in infer({"image": {b"__ndarray__": 1, b"data": b"", b"dtype": "|O", b"shape": []}})
        assert infer({"image": frame, "prompt": INSTRUCTION})["server_timing"]["prev_total_ms"] > 0
    state = STATE.astype(np.float32)
    with connect_openpi(chunks) as (metadata, infer):
        sent = {
            "observation/image": frame,
            "observation/left_wrist_image": frame,
            "observation/wrist_image_right": frame,
        }
        reply = infer({**sent, "observation/state": state, "prompt": INSTRUCTION})
        assert np.array_equal(reply["actions"], predict_directly(chunks.policy, [frame] * 3, state=state))
    assert rejected_websocket_status(server, Origin="http://evil.example") == 403


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"image": "/etc/passwd"}, "image", "paths and URLs are never opened"),
        ({"image": "http://127.0.0.1/a.png"}, "image", "paths and URLs are never opened"),
        ({"image": "file:///etc/passwd"}, "image", "paths and URLs are never opened"),
        ({"image": "data:image/png,abc"}, "image", "a data URL must be data:image/png;base64"),
        ({"image": base64.b64encode(b"GIF89a" * 9).decode()}, "image", "must be base64 of a PNG or JPEG"),
        ({"image": encode_picture(np.zeros((8, 8, 3), np.uint8))[:60]}, "image", "must be base64 of a PNG or JPEG"),
        (
            {"image": encode_picture(Image.new("I;16", (4, 4)))},
            "image",
            "image: A picture must have 8 bits .* got mode I;16",
        ),
        ({"image": encode_array(np.zeros((4, 4, 3), np.uint16))}, "image", "uint8, or float in .* got dtype uint16"),
        ({"image": encode_array(np.full((4, 4, 3), 255.0))}, "image", "must lie in .* got values from 255.0 to 255.0"),
        ({"instruction": "What action should the robot take to go?"}, "instruction", "is a whole prompt"),
        ({"instruction": "In: go\nOut:"}, "instruction", "is a whole prompt"),
        ({"constrain_actions": "yes"}, "constrain_actions", "must be true or false"),
        ({"image": [VALID_REQUEST["image"]] * 2}, "image", "takes 1 camera images a moment, got 2; send as many"),
        ({"image": 5}, "image", "must be base64 of a PNG or JPEG"),
        ({"image": None}, "image", "must be base64 of a PNG or JPEG"),
        ({"image": []}, "image", "must be base64 of a PNG or JPEG"),
        ({"image": [[[0.5, 1, 1]]]}, "image", "whole numbers 0 to 255"),
        ({"image": [[[0, 0, 256]]]}, "image", "whole numbers 0 to 255"),
        ({"image": [[[0, 0, True]]]}, "image", "whole numbers 0 to 255"),
        ({"image": [[[0, 0, 0]], [[0, 0]]]}, "image", "rows must have equal lengths"),
        ({"image": [[[0, 0]] * 4] * 4}, "image", r"\(4, 4, 2\)"),
        ({"image": [[[0, 0, 0]] * 40]}, "image", "a strip of 40 x 1"),
        ({"image": encode_array(FOUR + np.nan)}, "image", "must lie in"),
        ({"image": encode_array(FOUR + np.inf)}, "image", "must lie in"),
        ({"image": encode_array(FOUR + 2)}, "image", "must lie in"),
        ({"image": encode_array(FOUR.astype(np.int64))}, "image", "must be uint8, or float"),
        ({"image": encode_array(np.zeros((0, 4, 3), np.uint8))}, "image", "no pixels"),
        (
            {"image": encode_array(np.zeros(12, np.uint8))},
            "image",
            r"must have shape \(height, width, 3\), got \(12,\)",
        ),
        ({"image": {**encode_array(FOUR), "dtype": "|O"}}, "image", r"dtype must be .* got '\|O'"),
        ({"image": {**encode_array(FOUR), "dtype": "|S4"}}, "image", "dtype must be"),
        ({"image": {**encode_array(FOUR), "dtype": [["a", "<f4"]]}}, "image", "dtype must be"),
        ({"image": {**encode_array(FOUR), "shape": [2**40, 2**40, 3]}}, "image", "48 bytes are no array"),
        ({"image": {**encode_array(FOUR), "shape": [-2, -2, 3]}}, "image", "shape must be up to four sizes"),
        ({"image": {**encode_array(FOUR), "__numpy__": "%%%"}}, "image", "must be base64"),
        ({"image": [VALID_REQUEST["image"]] * 2}, "image", "takes 1 camera images a moment, got 2"),
        ({"image": [VALID_REQUEST["image"]] * 17}, "image", "holds 17 images"),
        ({"wrist_image": VALID_REQUEST["image"]}, "image", "takes 1 camera images a moment, got 2"),
        ({"full_image": VALID_REQUEST["image"]}, "full_image", "image and full_image mean the same"),
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
        ({"state": encode_array([0.0, np.nan])}, "state", "must be finite"),
        ({"state": [1e999]}, None, "Infinity"),
        ({"state": [10**400]}, "state", "beyond float64"),
    ],
)
def test_invalid_field_is_named(server, change, field, message):
    reply = send_request(server, body={**VALID_REQUEST, **change})
    assert 400 <= reply.status < 500
    assert reply.error["field"] == field
    with pytest.raises(ValueError, match=message):
        raise ValueError(reply.error["message"])


@pytest.mark.parametrize("name", ["image", "instruction"])
def test_missing_field_is_named(server, name):
    reply = send_request(server, body={other: value for other, value in VALID_REQUEST.items() if other != name})
    assert (reply.status, reply.error["field"]) == (422, name)


@pytest.mark.parametrize(
    "body", [b"", b"\xff\xfe", b"nonsense", b'{"image": NaN}', b"[" * 100000, b'{"encoded": 5}', b'{"encoded": "{"}']
)
def test_invalid_json_is_rejected(server, body):
    assert send_request(server, body=body).status in (400, 422)
    assert send_request(server, body=b"[]").error["message"] == "The body must be a JSON object, got list."


def test_missing_or_short_state_is_rejected(chunks, frame):
    body = {"image": [frame.tolist()] * 3, "instruction": INSTRUCTION}
    assert "needs the robot's state" in send_request(chunks, body=body).error["message"]
    short = send_request(chunks, body={**body, "state": [0.0] * 7})
    assert (short.error["field"], short.error["message"]) == ("state", "state must hold 8 numbers, got 7.")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_picture_of_100_megapixels_is_rejected_by_its_header(server):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 10000, 10000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")
    started = time.process_time()
    reply = send_request(server, body={"image": base64.b64encode(bomb).decode(), "instruction": "go"})
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
def test_duplicate_json_field_is_rejected(server, name, body):
    for reply in (send_request(server, body=body.encode()), send_request(server, body={"encoded": body})):
        assert (reply.status, reply.json["error"]["field"]) == (422, name)
        assert reply.json["error"]["message"] == f"A field was sent twice: '{name}'; send it once."


@pytest.mark.parametrize("name", ["\ud800", "\ud800_wrist"])
def test_field_name_that_is_not_unicode_is_rejected(server, name):
    reply = send_request(server, body={**VALID_REQUEST, name: 1})
    assert (reply.status, reply.error["field"]) == (422, name.replace("\ud800", "\\ud800"))


def test_duplicate_msgpack_field_is_rejected():
    msgpack, limits = pytest.importorskip("msgpack"), Limits()
    frame = b"\x83" + b"".join(map(msgpack.packb, ("prompt", "go", "image", 1, "prompt", "stop")))
    with pytest.raises(RequestError, match="A field was sent twice: 'prompt'"):
        parse_msgpack_request(frame, limits)
