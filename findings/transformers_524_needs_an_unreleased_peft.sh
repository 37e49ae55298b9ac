#!/usr/bin/env bash
# transformers 5.24.0, peft 0.21.2 (torch 2.13.0): its adapter methods need an unreleased peft.
#
# Expected: add_adapter() works with the newest peft on PyPI, 0.21.2, as it does on transformers 5.23.0.
# Seen: it raises ValueError and asks for peft 0.22.0. PyPI has no such release (2026-11-27). Installing both
#   gives no warning; peft.inject_adapter_in_model() works with this pair.
#
# Output seen:
#   newest peft: peft (0.21.2)
#   transformers 5.24.0: ValueError: The version of PEFT you are using is not compatible, please use a version >= 0.22.0
#   inject_adapter_in_model: works
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'EOF'
import peft
import transformers

sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))
config = peft.LoraConfig(target_modules=["q_proj"])
try:
    model.add_adapter(config)
    print("add_adapter: works")
except ValueError as error:
    print(f"transformers {transformers.__version__}: ValueError: {error}")
peft.inject_adapter_in_model(config, model)
print("inject_adapter_in_model: works")
EOF
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
echo "newest peft: $("$folder/venv/bin/pip" index versions peft 2>/dev/null | sed -n 1p)" | tee "$folder/output"
"$folder/venv/bin/python" "$folder/try.py" 2>"$folder/errors" | tee -a "$folder/output" || cat "$folder/errors" >&2
cat >"$folder/expected" <<'EOF'
newest peft: peft (0.21.2)
transformers 5.24.0: ValueError: The version of PEFT you are using is not compatible, please use a version >= 0.22.0
inject_adapter_in_model: works
EOF
diff "$folder/expected" "$folder/output" || { echo "changed: the newest peft, or what transformers 5.24.0 says to it" >&2; exit 1; }
