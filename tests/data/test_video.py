"""Frames of a video in any order: those of decoding it from its beginning to its end."""

import gc
import random
import weakref

import numpy as np
import pytest

av = pytest.importorskip("av")

from openvla.data.video import Video  # noqa: E402

NUM_FRAMES, RATE = 40, 10


# Encoder and its options, by the distance of the key frames.
ENCODINGS = {
    "2 frames apart": ("libx264", {"g": "2", "bf": "0"}),
    "12 frames apart, with B-frames": ("libx264", {"g": "12", "bf": "3", "b_strategy": "0"}),
    "2 frames apart, open GOPs": ("libx265", {"g": "2", "x265-params": "log-level=none"}),  # LeRobot's hevc
    "12 frames apart, open GOPs": ("mpeg4", {"g": "12", "bf": "2"}),
}


@pytest.fixture(scope="module", params=ENCODINGS)
def video_file(request, tmp_path_factory):
    """A video of noise that moves, with key frames at these distances."""
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    encoder, options = ENCODINGS[request.param]
    picture = np.random.default_rng(0).integers(0, 256, (64, 64 + NUM_FRAMES, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=RATE, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(NUM_FRAMES):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:, number : number + 64]))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def decoded(video_file):
    with av.open(str(video_file)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


ORDERS = {
    "stored": list(range(NUM_FRAMES)),
    "backwards": list(reversed(range(NUM_FRAMES))),
    "drawn": [random.Random(0).randrange(NUM_FRAMES) for _ in range(60)],
    "runs": [start + step for start in (30, 3, 17, 0, 34) for step in (0, 1, 1, 2, 4)],
    "last twice, then on from an earlier one": [NUM_FRAMES - 1, NUM_FRAMES - 1, 20, 21, 22, 20],
}


@pytest.mark.parametrize("order", ORDERS)
def test_frames_in_any_order_are_those_of_the_stored_order(video_file, decoded, order):
    assert len(decoded) == NUM_FRAMES
    video = Video(video_file)
    for number in ORDERS[order]:
        np.testing.assert_array_equal(video.frame(number / RATE), decoded[number])
    with pytest.raises(ValueError, match="no frame at 1.0500 s"):
        video.frame(1.05)
    with pytest.raises(ValueError, match="the video ends before"):
        video.frame(NUM_FRAMES / RATE)
    np.testing.assert_array_equal(video.frame(0.3), decoded[3])
    video.close()


@pytest.mark.parametrize("order", ["drawn", "stored"])
def test_a_video_goes_without_the_garbage_collector(video_file, order):
    """In a loader's worker, a fork, collecting a video of the parent process would wait for the decoder's threads."""
    video = Video(video_file)
    for number in ORDERS[order][:5]:
        video.frame(number / RATE)
    gone = weakref.ref(video)
    gc.disable()
    try:
        del video
        assert gone() is None
    finally:
        gc.enable()
