"""examples/add_traces.py: a dataset whose second camera has the traces, as a TraceVLA is trained on it."""

import runpy

import numpy as np
import pytest
import torch
from openvla.data.open import open_dataset
from openvla.data.torch_dataset import TorchDatasetReader
from openvla.inference.visual_trace import BUFFER_SIZE, VisualTrace
from openvla.training.collator import has_trace
from reference import REPOSITORY

pytest.importorskip("pyarrow")
EXAMPLE = runpy.run_path(str(REPOSITORY / "examples" / "add_traces.py"))
LENGTHS = (11, 3)


def moving_points(video, *, grid_size=0, queries=None):
    """Return points that move by two pixels a frame, whatever the video shows."""
    count = grid_size**2 if queries is None else queries.shape[1]
    start = torch.linspace(20, 200, count)[:, None].repeat(1, 2)
    steps = torch.arange(video.shape[1], dtype=torch.float32)[:, None, None]
    return (start + 2 * steps)[None]


def test_the_second_camera_has_the_trace_from_the_tenth_step_on(tmp_path):
    random = np.random.RandomState(0)
    steps = [
        {
            "image": random.randint(0, 256, (48, 64, 3), dtype=np.uint8),
            "action": random.uniform(-1, 1, 7),
            "task": "go",
            "state": random.uniform(-1, 1, 8),
        }
        for _ in range(sum(LENGTHS))
    ]
    fields = {"cameras": ["image"], "action": "action", "instruction": "task", "proprio": "state"}
    reader = TorchDatasetReader(steps, "mine", fields, episode_lengths=LENGTHS)
    target = tmp_path / "traced"
    assert EXAMPLE["add_traces"](reader, target, VisualTrace(moving_points)) == LENGTHS[0] - BUFFER_SIZE + 1
    assert EXAMPLE["add_traces"](reader, target, VisualTrace(moving_points)) == 0  # all episodes are there
    written = open_dataset(target)
    assert written.fields.cameras == (EXAMPLE["FRAME"], EXAMPLE["TRACE"])
    assert (written.action_dim, written.proprio_dim) == (7, 8)
    for episode, source, length in zip(written, reader, LENGTHS):
        np.testing.assert_allclose(episode.actions, source.actions, rtol=1e-6)
        traced = [has_trace(*episode.images(step)) for step in range(length)]
        assert traced == [step + 1 >= BUFFER_SIZE for step in range(length)]
        assert not episode.images(0)[1].any()
