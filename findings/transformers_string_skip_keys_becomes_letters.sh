#!/usr/bin/env bash
# transformers 5.9.0 to 5.24.0 (torch 2.13.0): a model's _skip_keys_device_placement given as a string becomes a set of letters.
#
# This attribute of model code names the keyword (the KV cache) that must not be moved between devices
# when a model is spread over several. transformers' own models gave one string for years, and accelerate's dispatch_model
# takes a string or a list.
#
# Expected: "past_key_values" still means that keyword, or is refused.
# Seen: 5.8.1 keeps the string. From 5.9.0, the next release, post_init() turns it into set("past_key_values"), a set of
#   single letters, without a warning. Tested: 5.8.1, 5.9.0, 5.23.0 and 5.24.0.
#
# Output seen:
#   5.8.1 past_key_values
#   5.9.0 ['_', 'a', 'e', 'k', 'l', 'p', 's', 't', 'u', 'v', 'y']
#   5.23.0 ['_', 'a', 'e', 'k', 'l', 'p', 's', 't', 'u', 'v', 'y']
#   5.24.0 ['_', 'a', 'e', 'k', 'l', 'p', 's', 't', 'u', 'v', 'y']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'EOF'
import torch
import transformers


class Model(transformers.PreTrainedModel):
    config_class = transformers.PretrainedConfig
    _skip_keys_device_placement = "past_key_values"

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(2, 2)
        self.post_init()


found = Model(transformers.PretrainedConfig())._skip_keys_device_placement
print(transformers.__version__, found if isinstance(found, str) else sorted(found))
EOF
python3 -m venv "$folder/venv"
for version in 5.8.1 5.9.0 5.23.0 5.24.0; do
  "$folder/venv/bin/pip" install --quiet torch==2.13.0 "transformers==$version"
  "$folder/venv/bin/python" "$folder/try.py" 2>"$folder/errors" | tee -a "$folder/output" || cat "$folder/errors" >&2
done
cat >"$folder/expected" <<'EOF'
5.8.1 past_key_values
5.9.0 ['_', 'a', 'e', 'k', 'l', 'p', 's', 't', 'u', 'v', 'y']
5.23.0 ['_', 'a', 'e', 'k', 'l', 'p', 's', 't', 'u', 'v', 'y']
5.24.0 ['_', 'a', 'e', 'k', 'l', 'p', 's', 't', 'u', 'v', 'y']
EOF
diff "$folder/expected" "$folder/output" || { echo "changed: what becomes of a string in _skip_keys_device_placement" >&2; exit 1; }
