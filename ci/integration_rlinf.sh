#!/usr/bin/env bash
# integrations/rlinf in RLinf's own rollout and actor code, in an environment of its own, on the CPU and without Ray's cluster.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.lanes/rlinf
if [ ! -e "$venv/.installed" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  # RLinf's own requirements hold its simulators and GPU libraries; these are what importing its workers needs.
  "$venv/bin/pip" install --quiet -c ci/constraints.txt -e . transformers==4.57.6 "peft<1" pytest hydra-core==1.3.8 ray==2.60.0
  "$venv/bin/pip" install --quiet --no-deps rlinf==0.3.0
  touch "$venv/.installed"
fi
export OMP_NUM_THREADS=1
cd integrations/rlinf
"../../$venv/bin/python" -m pytest -q -c /dev/null --rootdir . -W ignore test_openvla_rlinf.py
