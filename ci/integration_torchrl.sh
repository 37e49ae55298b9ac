#!/usr/bin/env bash
# Run integrations/torchrl with TorchRL's own environment, replay buffer and losses.
#   bash ci/integration_torchrl.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/environment.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

lock_environments
make_environment torchrl
install torchrl --reinstall-package openvla -e . torchrl==0.14.1 pytest
unlock_environments
cd integrations/torchrl
"$root/torchrl/bin/python" -m pytest -q -c /dev/null --rootdir . -W ignore test_openvla_torchrl.py
