#!/usr/bin/env bash
# transformers 5.24.0 with torchao 0.18.0 and torch 2.13.0 (the newest on 2026-11-28): any model class imports torchao.
#
# A process imports LlamaForCausalLM, without and with torchao installed; nothing is quantised.
#
# Expected: an optional back end of quantisation is imported when a quantised model is loaded.
# Seen: quantizer_torchao imports torchao with the first model class, which takes longer and on a CPU build of torch writes lines about
#   CUDA libraries and enums to stderr, in every program that imports a model. So torchao belongs into an extra of its own.
#
# Output seen (seconds vary):
#   without torchao: 2.56 s of CPU time, imported: False, lines on stderr: 0
#   with torchao: 2.82 s of CPU time, imported: True, lines on stderr: 4
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'EOF2'
import sys
import time

started = time.process_time()
from transformers import LlamaForCausalLM  # noqa: F401

print(f"{time.process_time() - started:.2f} s of CPU time, imported: {'torchao' in sys.modules}")
EOF2
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
measure() {  # label
  "$folder/venv/bin/python" "$folder/try.py" >"$folder/out" 2>"$folder/err"  # the first run compiles bytecode
  "$folder/venv/bin/python" "$folder/try.py" >"$folder/out" 2>"$folder/err"
  echo "$1: $(cat "$folder/out"), lines on stderr: $(wc -l <"$folder/err")"
}
measure "without torchao"
grep -q "imported: False" "$folder/out" || { echo "changed" >&2; exit 1; }
"$folder/venv/bin/pip" install --quiet --no-deps torchao==0.18.0
measure "with torchao"
grep -q "imported: True" "$folder/out" || { echo "changed" >&2; exit 1; }
