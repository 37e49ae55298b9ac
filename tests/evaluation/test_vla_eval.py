"""The demo policy in vla-eval's unmodified OpenVLA server, which does not know this package."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from reference import FIXTURES

pytest.importorskip("vla_eval")

from openvla import load_policy
from openvla.evaluation.vla_eval import PolicyServer

pytestmark = [
    pytest.mark.lane,
    pytest.mark.skipif(not hasattr(transformers, "AutoModelForVision2Seq"), reason="that server needs transformers 4"),
]
TASK = "pick up the alphabet soup and place it in the basket"
FRAMES = sorted((FIXTURES / "libero_episode").glob("*.jpg"))
HARNESS_SCRIPT = """
import sys
import numpy as np
from vla_eval.model_servers.openvla import OpenVLAModelServer

server = OpenVLAModelServer(sys.argv[1])
frames = np.load(sys.argv[2])
actions = [server.predict({"images": {"agentview": frame}, "task_description": sys.argv[4]}, None) for frame in frames]
np.save(sys.argv[3], np.stack([action["actions"] for action in actions]))
assert "openvla" not in sys.modules
"""


def test_harness_server_predicts_the_same_actions(tmp_path):
    policy = load_policy(dtype=torch.bfloat16)  # the dtype of that server
    policy.model.save_pretrained(tmp_path / "model")  # with its code
    policy.processor.save_pretrained(tmp_path / "model")
    # At this size the server's resize changes nothing.
    frames = [np.asarray(Image.open(frame).resize((224, 224))) for frame in FRAMES]
    np.save(tmp_path / "frames.npy", np.stack(frames))
    script = tmp_path / "harness.py"
    script.write_text(HARNESS_SCRIPT)
    subprocess.run(
        [sys.executable, script, tmp_path / "model", tmp_path / "frames.npy", tmp_path / "actions.npy", TASK],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,  # not the repository, whose folder would be the package
        check=True,
    )
    server = PolicyServer(policy)
    predictions = [server.predict({"images": {"agentview": frame}, "task_description": TASK}, None) for frame in frames]
    actions = np.stack([prediction["actions"] for prediction in predictions])
    np.testing.assert_array_equal(np.load(tmp_path / "actions.npy"), actions)
    assert len(np.unique(actions, axis=0)) > len(frames) // 2  # the actions depend on the frames
