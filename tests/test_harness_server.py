"""A saved policy in vla-eval's own, unmodified OpenVLA server, which does not know this package."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from frames import frames
from PIL import Image

pytest.importorskip("vla_eval")

from openvla import Policy, load_policy
from openvla.libero_harness import PolicyServer
from openvla.tiny import build_tiny

pytestmark = [
    pytest.mark.lane,
    pytest.mark.skipif(not hasattr(transformers, "AutoModelForVision2Seq"), reason="that server needs transformers 4"),
]
TASK = "pick up the milk and place it in the basket"
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
    model, processor = build_tiny()
    with torch.no_grad():  # that server does not hold random weights to action tokens
        model.get_output_embeddings().weight[: model.action_token_ids.start] = 0
    model.bfloat16().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    # At this size that server's own resize changes nothing.
    shown = [np.asarray(Image.fromarray(frame).resize((224, 224))) for frame in frames().values()]
    np.save(tmp_path / "frames.npy", np.stack(shown))
    script = tmp_path / "theirs.py"
    script.write_text(THEIRS)
    subprocess.run(
        [sys.executable, script, tmp_path / "model", tmp_path / "frames.npy", tmp_path / "actions.npy", TASK],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,  # not the repository, whose folder would be the package
        check=True,
    )
    loaded = load_policy(tmp_path / "model", dtype=torch.bfloat16)
    server = PolicyServer(Policy(loaded.model, loaded.processor, loaded.unnorm_key))
    ours = [server.predict({"images": {"agentview": frame}, "task_description": TASK}, None) for frame in shown]
    found = np.stack([answer["actions"] for answer in ours])
    np.testing.assert_array_equal(np.load(tmp_path / "actions.npy"), found)
    assert len(np.unique(found, axis=0)) > len(shown) // 2  # the frames are seen
