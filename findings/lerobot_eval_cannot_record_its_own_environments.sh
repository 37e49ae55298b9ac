#!/usr/bin/env bash
# LeRobot 0.6.1: lerobot-eval --eval.recording=true fails for LeRobot's own environments with named cameras.
#
# The features of the environments aloha and libero are named "pixels/top", "pixels/agentview_image". lerobot-eval makes a
# dataset of these features to record the episodes in.
#
# Expected: a dataset of the evaluation's episodes.
# Seen: ValueError before the first step, because names of features must not contain "/".
#
# Needs Python 3.12 (PYTHON=...).
#
# Output seen:
#   lerobot 0.6.1: aloha: Feature names should not contain '/'.
#   lerobot 0.6.1: libero: Feature names should not contain '/'.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'END_OF_FILE'
import sys

import lerobot
from lerobot.datasets import LeRobotDataset
from lerobot.envs import make_env_config
from lerobot.scripts.lerobot_eval import _env_features_to_dataset_features

failed = []
for name in ("aloha", "libero"):
    features = _env_features_to_dataset_features(make_env_config(name).features)
    try:  # as lerobot_eval.rollout does before its first step
        LeRobotDataset.create(repo_id="eval_recording", fps=30, features=features, root=f"{sys.argv[1]}/{name}", use_videos=True)
    except ValueError as error:
        failed.append(name)
        print(f"lerobot {lerobot.__version__}: {name}: {str(error).partition(' Found')[0]}")
raise SystemExit(failed != ["aloha", "libero"])
END_OF_FILE
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "lerobot[evaluation,training]==0.6.1"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/try.py" "$folder" 2>/dev/null || { echo "changed: recordings of evaluations" >&2; exit 1; }
