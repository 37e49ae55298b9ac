"""The embedded default in vla-eval's own, unmodified OpenVLA server, which does not know this package."""

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
THEIRS = """
import sys
import numpy as np
from vla_eval.model_servers.openvla import OpenVLAModelServer

server = OpenVLAModelServer(sys.argv[1])
frames = np.load(sys.argv[2])
actions = [server.predict({"images": {"agentview": frame}, "task_description": sys.argv[4]}, None) for frame in frames]
np.save(sys.argv[3], np.stack([action["actions"] for action in actions]))
assert "openvla" not in sys.modules
"""


def test_it_gives_our_actions(tmp_path):
    policy = load_policy(dtype=torch.bfloat16)  # as that server computes
    policy.model.save_pretrained(tmp_path / "model")  # with the code
    policy.processor.save_pretrained(tmp_path / "model")
    # At this size that server's own resize changes nothing.
    shown = [np.asarray(Image.open(frame).resize((224, 224))) for frame in FRAMES]
    np.save(tmp_path / "frames.npy", np.stack(shown))
    script = tmp_path / "theirs.py"
    script.write_text(THEIRS)
    subprocess.run(
        [sys.executable, script, tmp_path / "model", tmp_path / "frames.npy", tmp_path / "actions.npy", TASK],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,  # not the repository, whose folder would be the package
        check=True,
    )
    server = PolicyServer(policy)
    ours = [server.predict({"images": {"agentview": frame}, "task_description": TASK}, None) for frame in shown]
    found = np.stack([answer["actions"] for answer in ours])
    np.testing.assert_array_equal(np.load(tmp_path / "actions.npy"), found)
    assert len(np.unique(found, axis=0)) > len(shown) // 2  # the frames are seen
