#!/usr/bin/env bash
# Run integrations/rlinf in RLinf's own rollout and actor code, on the CPU and without Ray's cluster.
#   bash ci/integration_rlinf.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/environment.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

lock_environments
make_environment rlinf
# RLinf's own requirements hold its simulators and GPU libraries; these are what importing its workers needs.
install rlinf --reinstall-package openvla -e . transformers==4.57.6 "peft<1" pytest hydra-core==1.3.8 ray==2.60.0
install rlinf --no-deps rlinf==0.3.0
unlock_environments
cd integrations/rlinf
"$root/rlinf/bin/python" -m pytest -q -c /dev/null --rootdir . -W ignore test_openvla_rlinf.py
