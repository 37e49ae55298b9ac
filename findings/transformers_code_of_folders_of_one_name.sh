#!/usr/bin/env bash
# transformers 4.57.6 and 5.24.0 (torch 2.13.0): of two local folders with the same name, the second runs code of the first.
#
# Two folders, both called "model", hold custom code: the same configuration_toy.py, but each its own modeling_toy.py and
# helper_toy.py. One process loads both with trust_remote_code=True.
#
# Expected: every folder runs its own files, as two repositories of the Hub do.
# Seen: 4.57.6 runs the second folder's modeling_toy.py with the first folder's helper_toy.py: a mix that nobody wrote.
#   5.24.0 stores code under a digest, but AutoModel takes that of the configuration's file alone: the second folder
#   runs the first one's modeling_toy.py and helper_toy.py. No warning in either. 5.5.4 and 5.23.0 behave as 5.24.0.
#
# Output seen:
#   transformers 4.57.6, folder 1: modeling_toy.py of 1, helper_toy.py of 1
#   transformers 4.57.6, folder 2: modeling_toy.py of 2, helper_toy.py of 1
#   transformers 5.24.0, folder 1: modeling_toy.py of 1, helper_toy.py of 1
#   transformers 5.24.0, folder 2: modeling_toy.py of 1, helper_toy.py of 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'END'
import sys
import tempfile
from pathlib import Path

import transformers

FILES = {
    "configuration_toy.py": """
from transformers import PretrainedConfig


class ToyConfig(PretrainedConfig):
    model_type = "toy"
""",
    "modeling_toy.py": """
import torch
from transformers import PreTrainedModel

from .configuration_toy import ToyConfig
from .helper_toy import OF_HELPER

OF_MODEL = {number}


class ToyModel(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(2, 2)
        self.post_init()

    def files(self):
        return OF_MODEL, OF_HELPER
""",
    "helper_toy.py": "OF_HELPER = {number}\n",
    "config.json": """{{"model_type": "toy", "architectures": ["ToyModel"], "auto_map":
{{"AutoConfig": "configuration_toy.ToyConfig", "AutoModel": "modeling_toy.ToyModel"}}}}""",
}
seen = []
for number in (1, 2):
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1])) / "model"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text.format(number=number))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModel.from_config(config, trust_remote_code=True)
    model.save_pretrained(folder)
    loaded = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    seen.append(loaded.files())
    print(f"transformers {transformers.__version__}, folder {number}: modeling_toy.py of {seen[-1][0]}, ", end="")
    print(f"helper_toy.py of {seen[-1][1]}")
raise SystemExit(seen != [(1, 1), (2, 1) if transformers.__version__.startswith("4.") else (1, 1)])
END
python3 -m venv "$folder/venv"
export HF_HUB_OFFLINE=1
for version in 4.57.6 5.24.0; do
  "$folder/venv/bin/pip" install --quiet torch==2.13.0 "transformers==$version"
  HF_MODULES_CACHE="$folder/code-$version" "$folder/venv/bin/python" "$folder/try.py" "$folder" 2>"$folder/log" ||
    { tail -n 3 "$folder/log" >&2; echo "changed: whose code the second folder runs" >&2; exit 1; }
done
