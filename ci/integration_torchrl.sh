#!/usr/bin/env bash
# integrations/torchrl with TorchRL's own environment, replay buffer and losses, in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.lanes/torchrl
if [ ! -e "$venv/.installed" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install --quiet -c ci/constraints.txt -e . torchrl==0.14.1 pytest
  touch "$venv/.installed"
fi
export OMP_NUM_THREADS=1
cd integrations/torchrl
"../../$venv/bin/python" -m pytest -q -c /dev/null --rootdir . -W ignore test_openvla_torchrl.py
