#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0): a model saved in shards into a folder that holds one weight file loads as the OLD model.
#
# A model is saved in one file, changed, and saved into the same folder again with a smaller max_shard_size.
#
# Expected: save_pretrained replaces what an earlier save left (it does remove old shards), and loading gives the new weights.
# Seen: model.safetensors of the first save stays beside the shards and their index, and from_pretrained prefers it: the
#   weights of the first save are loaded, without a warning. The same on 4.57.6, 5.5.4 and 5.23.0.
#
# Output seen:
#   transformers 5.24.0: saved 1.0 in one file, then 2.0 in 5 shards
#   in the folder: model-00001-of-00005.safetensors, ..., model.safetensors, model.safetensors.index.json
#   loaded: 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'END'
import sys
import tempfile
from pathlib import Path

import torch
import transformers

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=200, **sizes))
folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))


def save(value, **options):
    with torch.no_grad():
        model.lm_head.weight.fill_(value)
    model.save_pretrained(folder, **options)


def loaded():
    return transformers.LlamaForCausalLM.from_pretrained(folder).lm_head.weight[0, 0].item()


save(1.0)
save(2.0, max_shard_size="100KB")
names = sorted(path.name for path in folder.glob("*.safetensors*"))
print(f"transformers {transformers.__version__}: saved 1.0 in one file, then 2.0 in {len(names) - 2} shards")
print(f"in the folder: {names[0]}, ..., {names[-2]}, {names[-1]}")
print(f"loaded: {loaded()}")
raise SystemExit(loaded() != 1.0 or names[-2:] != ["model.safetensors", "model.safetensors.index.json"])
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" "$folder/try.py" "$folder" || { echo "changed: which weights are loaded" >&2; exit 1; }
