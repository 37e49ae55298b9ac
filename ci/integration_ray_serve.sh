#!/usr/bin/env bash
# examples/ray_serve.py on Ray Serve itself: two replicas on loopback, every action compared, a replica killed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.lanes/ray_serve
if [ ! -e "$venv/.installed" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install --quiet -c ci/constraints.txt "ray[serve]==2.60.0" -e .
  touch "$venv/.installed"
fi
export OMP_NUM_THREADS=1
"$venv/bin/python" examples/ray_serve.py --requests 100
"$venv/bin/python" examples/ray_serve.py --requests 100 --kill
