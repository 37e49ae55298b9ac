#!/usr/bin/env bash
# rlinf 0.3.0: its value head cannot be built with its own default arguments.
#
# ValueHead(input_dim) has activation="gelu" by default and initialises by kaiming_normal_(nonlinearity="gelu"), which torch
# does not know. Inside transformers 4.40's from_pretrained, where its own OpenVLA models build it, torch's initialisers are
# switched off, so that it is not seen there (and its layers keep torch's default initialisation).
#
# Expected: a value head.
# Seen: ValueError. With activation="relu" it is built.
#
# Output seen:
#   torch 2.13.0+cpu: ValueHead(64) raises ValueError: Unsupported nonlinearity gelu; with activation="relu" it has 99072 parameters
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'END'
import torch
from rlinf.models.embodiment.modules.value_head import ValueHead

seen = ""
try:
    ValueHead(64)
except ValueError as error:
    seen = str(error)
parameters = sum(parameter.numel() for parameter in ValueHead(64, activation="relu").parameters())
print(f"torch {torch.__version__}: ValueHead(64) raises ValueError: {seen}; ", end="")
print(f'with activation="relu" it has {parameters} parameters')
raise SystemExit(seen != "Unsupported nonlinearity gelu")
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==4.57.6 hydra-core==1.3.8 ray==2.60.0
"$folder/venv/bin/pip" install --quiet --no-deps rlinf==0.3.0
"$folder/venv/bin/python" "$folder/try.py" || { echo "changed: what becomes of the value head's default" >&2; exit 1; }
