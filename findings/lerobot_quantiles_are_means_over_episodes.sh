#!/usr/bin/env bash
# LeRobot 0.6.1: the quantiles of a dataset are the means of its episodes' quantiles, not the quantiles of its frames.
#
# A dataset of two episodes of 100 frames: an action that is 0 in the first and 100 in the second.
#
# Expected: q01 = 0 and q99 = 100 in meta/stats.json, the quantiles of all frames.
# Seen: q01 = q99 = 50. A policy that normalises by quantiles maps both values far outside [-1, 1], or divides by the
#   epsilon. Known: huggingface/lerobot#4156.
#
# Needs Python 3.12 (PYTHON=...).
#
# Output seen:
#   lerobot 0.6.1: q01 50.0, q99 50.0; of all frames [0.0, 100.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'END_OF_FILE'
import sys

import lerobot
import numpy as np
from lerobot.datasets import LeRobotDataset

features = {"action": {"dtype": "float32", "shape": (1,), "names": ["x"]}}
dataset = LeRobotDataset.create("me/two", fps=10, features=features, root=sys.argv[1] + "/data", use_videos=False)
values = [np.full(100, value, np.float32) for value in (0, 100)]
for episode in values:
    for value in episode:
        dataset.add_frame({"action": value[None], "task": "move"})
    dataset.save_episode()
dataset.finalize()
q01, q99 = (float(dataset.meta.stats["action"][name][0]) for name in ("q01", "q99"))
exact = np.quantile(np.concatenate(values), [0.01, 0.99]).tolist()
print(f"lerobot {lerobot.__version__}: q01 {q01:.1f}, q99 {q99:.1f}; of all frames {exact}")
raise SystemExit(abs(q01 - exact[0]) < 1 and abs(q99 - exact[1]) < 1)
END_OF_FILE
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "lerobot[dataset]==0.6.1"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder" 2>/dev/null || { echo "changed: the quantiles of several episodes" >&2; exit 1; }
