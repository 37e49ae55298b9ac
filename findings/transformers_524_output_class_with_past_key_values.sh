#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0): an output class that declares past_key_values itself can no longer be built.
#
# Model code outside transformers often has a dataclass of its own, derived from ModelOutput, with the field
# past_key_values. 5.24.0 renames that keyword to "cache" in the __init__ of every subclass of ModelOutput; the comment in
# transformers/utils/generic.py says that this is there to keep remote code working.
#
# Expected: such a class works on 5.24.0 as it did on 5.23.0.
# Seen: it works on 5.23.0. On 5.24.0 building it with the keyword is a TypeError, since the class has no field "cache".
#   Building it by position raises nothing, but the output has lost past_key_values: it reads as None. A class that is
#   derived from CausalLMOutputWithPast, and so inherits the field, works on both.
#
# Output seen:
#   5.23.0 Own ['logits', 'past_key_values']
#   5.23.0 Own by position ['logits', 'past_key_values'] 2.0
#   5.23.0 Inherited ['logits', 'past_key_values']
#   5.24.0 Own TypeError: Own.__init__() got an unexpected keyword argument 'cache'
#   5.24.0 Own by position ['logits'] None
#   5.24.0 Inherited ['logits', 'cache']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'EOF'
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput


@dataclass
class Own(ModelOutput):
    logits: Any = None
    past_key_values: Any = None


@dataclass
class Inherited(CausalLMOutputWithPast):
    features: Any = None


for kind in (Own, Inherited):
    try:
        said = list(kind(logits=1.0, past_key_values=2.0))
    except TypeError as error:
        said = f"TypeError: {error}"
    print(transformers.__version__, kind.__name__, said)
    if kind is Own:
        output = Own(1.0, 2.0)
        print(transformers.__version__, "Own by position", list(output), output.past_key_values)
EOF
python3 -m venv "$folder/venv"
for version in 5.23.0 5.24.0; do
  "$folder/venv/bin/pip" install --quiet torch==2.13.0 "transformers==$version"
  "$folder/venv/bin/python" "$folder/try.py" 2>"$folder/errors" | tee -a "$folder/output" || cat "$folder/errors" >&2
done
cat >"$folder/expected" <<'EOF'
5.23.0 Own ['logits', 'past_key_values']
5.23.0 Own by position ['logits', 'past_key_values'] 2.0
5.23.0 Inherited ['logits', 'past_key_values']
5.24.0 Own TypeError: Own.__init__() got an unexpected keyword argument 'cache'
5.24.0 Own by position ['logits'] None
5.24.0 Inherited ['logits', 'cache']
EOF
diff "$folder/expected" "$folder/output" || { echo "changed: how an output class with its own past_key_values is built" >&2; exit 1; }
