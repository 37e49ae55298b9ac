"""Visual traces: steps, calls of the tracker, choices and drawn pixels equal the authors' code."""

import hashlib
import sys
from types import ModuleType

import numpy as np
import PIL
import pytest
import torch
from openvla.inference.visual_trace import CoTracker3, VisualTrace, draw_trace, point_colors
from PIL import Image
from tracevla import SOURCE, read

pytestmark = pytest.mark.lane
DRAWING, STATES = read("drawing.json"), read("states.json")
KEYWORDS = {"linewidth": "line_width"}
IS_EXACT_PILLOW = tuple(map(int, PIL.__version__.split(".")[:2])) >= (11, 1)


def frame(index):
    """Return the frame of a step, from 1 on, as ``frame_rule`` in states.json says."""
    array = np.full((96, 112, 3), 9 * index % 256, np.uint8)
    array[10:20, 5 + index : 15 + index] = (200, index, 40)
    array[0, 0] = (index, 255 - index, 7)
    return Image.fromarray(array)


def sha256(image):
    return hashlib.sha256(np.array(image).tobytes()).hexdigest()


@pytest.mark.parametrize("case", DRAWING["cases"], ids=lambda case: case["name"])
def test_golden_drawings(case):
    arrays = np.load(SOURCE / "drawing.npz")
    image, trace, expected = (arrays[f"{case['name']}/{part}"] for part in ("image", "trace", "overlaid"))
    kwargs = {KEYWORDS.get(name, name): value for name, value in case["kwargs"].items()}
    drawn = draw_trace(Image.fromarray(image), trace, **kwargs)
    if IS_EXACT_PILLOW:
        np.testing.assert_array_equal(np.array(drawn), expected)
        assert sha256(drawn) == case["sha256"]
    else:
        assert sha256(drawn) == case["sha256_pillow_10.4.0"] or PIL.__version__ != "10.4.0"
        assert (np.array(drawn) != expected).any(axis=-1).sum() <= 6


def test_golden_colours():
    for count, colors in DRAWING["colours_by_number_of_points"].items():
        assert [list(color) for color in point_colors(int(count))] == colors


class GoldenTracker:
    """A tracker that returns the given tracks of a scenario and checks what it is asked."""

    def __init__(self, name):
        self.name, self.arrays = name, np.load(SOURCE / "states.npz")
        self.calls = []

    def __call__(self, video, *, grid_size=0, queries=None):
        key = f"{self.name}/call{len(self.calls)}"
        if queries is not None:
            np.testing.assert_array_equal(queries.numpy(), self.arrays[f"{key}/queries"])
        self.calls.append(
            {
                "index": len(self.calls),
                "kind": "grid" if queries is None else "queries",
                "grid_size": grid_size,
                "video_shape": list(video.shape),
                "video_dtype": str(video.dtype),
                "frames": [int(value) for value in video[0, :, 0, 0, 0]],  # pixel (0, 0) holds the step
            }
        )
        return torch.from_numpy(self.arrays[f"{key}/tracks"])[None]


@pytest.mark.parametrize("name", STATES["scenarios"])
def test_golden_states(name):
    scenario, arrays = STATES["scenarios"][name], np.load(SOURCE / "states.npz")
    tracker = GoldenTracker(name)
    trace = VisualTrace(tracker, seed=scenario["numpy_seed"], **scenario["kwargs"])
    for step in scenario["steps"]:
        if step["step"] in scenario["resets"]:
            trace.reset()
        made = len(tracker.calls)
        image = frame(step["step"])
        before = image.copy()
        drawn = trace.update(image)
        assert image == before
        assert (tracker.calls[made:] or [None]) == [step["call"]]
        assert trace.step == step["processor_step"]
        assert (drawn is not None) == step["has_trace"]
        assert trace.is_traced == step["traced"]
        assert trace.failed_step == step["last_trace_step"]
        assert (None if trace.trace is None else len(trace.trace)) == step["trace_length"]
        key = f"{name}/step{step['step']}"
        for part, value in (("trace_last", -1), ("trace", slice(None))):
            if f"{key}/{part}" in arrays:
                np.testing.assert_array_equal(trace.trace[value], arrays[f"{key}/{part}"])
        if drawn is None:
            assert sha256(image) == step["sha256"]
        elif IS_EXACT_PILLOW:
            assert sha256(drawn) == step["sha256"]
            np.testing.assert_array_equal(np.array(drawn), arrays[f"{key}/overlaid"])
    assert len(tracker.calls) == sum(key.startswith(f"{name}/") and key.endswith("/tracks") for key in arrays)


def test_a_trace_of_one_step_cannot_be_drawn():
    assert [error["what"] for error in DRAWING["errors"]] == ["one step"]
    with pytest.raises(ValueError, match=r"\(steps, points, 2\) with 2 steps or more, got \(1, 5, 2\)"):
        draw_trace(frame(1), np.zeros((1, 5, 2), np.float32))


def still(video, *, grid_size=0, queries=None):
    """A tracker whose points do not move."""
    return torch.zeros(1, video.shape[1], grid_size**2 or queries.shape[1], 2)


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        (lambda video, **points: still(video, **points)[0], r"got \(10, 900, 2\)"),
        (lambda video, **points: still(video, **points)[:, 1:], r"got \(1, 9, 900, 2\)"),
        (lambda video, **points: still(video, **points) * float("nan"), "must return finite positions"),
    ],
)
def test_a_tracker_s_result_is_checked(tracker, message):
    trace = VisualTrace(tracker)
    for step in range(9):
        assert trace.update(frame(step)) is None
    with pytest.raises(ValueError, match=message):
        trace.update(frame(9))


def test_frames_and_settings_are_checked():
    trace = VisualTrace(still)
    trace.update(frame(1))
    with pytest.raises(ValueError, match=r"of 8 x 8 pixels follows frames of 112 x 96; call reset\(\)"):
        trace.update(Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="must be RGB with 8 bits a channel, got mode 'L'"):
        trace.update(Image.new("L", (8, 8)))
    for settings in ({"num_points": 0}, {"window_size": 1}):
        with pytest.raises(ValueError, match="num_points must be 1 or more and window_size 2 steps or more"):
            VisualTrace(still, **settings)
    with pytest.raises(ValueError, match="tracker must be a function"):
        VisualTrace("cotracker")


def test_cotracker_is_used_where_it_is_installed(monkeypatch):
    calls = []

    class Predictor(torch.nn.Module):
        def __init__(self, checkpoint):
            super().__init__()
            calls.append(checkpoint)

        def forward(self, video, **points):
            calls.append(points)
            return still(video, **points), None

    monkeypatch.setitem(sys.modules, "cotracker", None)
    with pytest.raises(ImportError, match=r"CC BY-NC 4.0, forbids commercial use\): pip install git"):
        CoTracker3("scaled_offline.pth")
    module = ModuleType("cotracker.predictor")
    module.CoTrackerPredictor = Predictor
    monkeypatch.setitem(sys.modules, "cotracker", ModuleType("cotracker"))
    monkeypatch.setitem(sys.modules, "cotracker.predictor", module)
    tracker = CoTracker3("scaled_offline.pth", device="cpu")
    video, queries = torch.zeros(1, 10, 3, 8, 8), torch.zeros(1, 5, 3)
    assert tracker(video, grid_size=3).shape == (1, 10, 9, 2)
    assert tracker(video, queries=queries).shape == (1, 10, 5, 2)
    assert calls == ["scaled_offline.pth", {"grid_size": 3}, {"queries": queries}]
