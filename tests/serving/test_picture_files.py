"""Picture files read from a path, by PolicyClient and by the server: the same pixels, or the same refusal."""

import base64
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from openvla.images_openvla import as_images
from openvla.serving import client as policy_client
from openvla.serving.cli import Limits
from PIL import Image, ImageOps

serve_requests = pytest.importorskip("openvla.serving.requests", exc_type=ImportError)


def png_of_16_bits(pixels):
    """Return a PNG file of uint16 ``(height, width, 2 (grey and alpha), 3 or 4)``, which Pillow cannot write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


READERS = {
    "path": lambda file: np.asarray(as_images(str(file))[0]),
    "client": lambda file: policy_client.image_pixels(file),
    "server": lambda file: np.asarray(
        serve_requests.parse_image(base64.b64encode(file.read_bytes()).decode(), "image", Limits())
    ),
}


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colours_are_refused_by_every_reader(channels, tmp_path):
    """Pillow would keep the upper byte, so that 12-bit data, or depth in millimetres, became black."""
    file = tmp_path / "picture.png"
    file.write_bytes(png_of_16_bits(np.full((4, 4, channels), 4000, np.uint16)))
    opened = {
        "opened": lambda file: as_images(Image.open(file)),
        "client's": lambda file: policy_client.image_pixels(Image.open(file)),
    }
    for read in (READERS | opened).values():
        with pytest.raises(ValueError, match="must have 8 bits a channel, got mode (LA|RGB|RGBA);16B"):
            read(file)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_file_with_several_frames_is_refused(form, tmp_path):
    file, frames = tmp_path / "film", [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    for name in ("path", "client", "server") if form == "PNG" else ("path", "client"):
        with pytest.raises(ValueError, match="must hold one frame, got 2"):
            READERS[name](file)
    opened = Image.open(file)
    opened.seek(1)
    assert np.argmax(np.asarray(as_images(opened)[0])[0, 0]) == 2  # blue: the frame that was chosen


def test_mpo_previews_are_not_counted_as_frames(tmp_path):
    file, photo = tmp_path / "photo.jpg", Image.new("RGB", (16, 16), (250, 0, 0))
    photo.save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8), "blue")], quality=95)
    for name, read in READERS.items():
        np.testing.assert_allclose(read(file)[0, 0].astype(int), (250, 0, 0), atol=4, err_msg=name)


def test_broken_exif_is_ignored(tmp_path):
    file, pixels = tmp_path / "photo.png", np.random.RandomState(0).randint(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, exif=b"broken")
    for name, read in READERS.items():
        assert np.array_equal(read(file), pixels), name
    assert np.array_equal(np.asarray(as_images(Image.open(file))[0]), pixels)


@pytest.mark.parametrize("orientation", range(0, 10))
def test_every_reader_applies_the_exif_orientation(orientation, tmp_path):
    exif, file = Image.Exif(), tmp_path / "photo.png"
    exif[0x0112] = orientation
    pixels = np.random.RandomState(0).randint(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    assert (expected.shape == (12, 8, 3)) == (5 <= orientation <= 8)
    for name, read in READERS.items():
        assert np.array_equal(read(file), expected), name


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_array_of_several_cameras_is_sent_as_images(kind, monkeypatch):
    images = np.random.RandomState(0).randint(0, 256, (2, 8, 12, 3), dtype=np.uint8)
    cameras = images if kind == "numpy" else torch.from_numpy(images).permute(0, 3, 1, 2)
    client, sent = policy_client.PolicyClient("http://127.0.0.1:1"), []
    reply = json.loads(json.dumps(policy_client.encode_array(np.zeros(7))))
    monkeypatch.setattr(client, "_request", lambda method, path, fields, deadline: sent.append(fields) or reply)
    monkeypatch.setattr(client, "_info", lambda deadline: {})
    client.act(cameras, "go")
    received = serve_requests.parse_images(sent[0]["image"], "image", Limits())
    assert all(np.array_equal(actual, expected) for actual, expected in zip(received, images, strict=True))
    assert all(np.array_equal(actual, expected) for actual, expected in zip(as_images(cameras), images, strict=True))


def test_file_object_is_refused(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"")
    with (tmp_path / "photo.png").open("rb") as opened, pytest.raises(TypeError, match="a torch tensor or a path, got"):
        policy_client.image_pixels(opened)
