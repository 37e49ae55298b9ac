#!/usr/bin/env bash
# Run the package openpi-client against this package: its client at openvla serve, and openvla evaluate --server at a
# server that packs its messages with it; then both demo policies behind openvla serve in LIBERO. It needs numpy 1.
#   bash ci/integration_openpi.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/environment.sh

lock_environments
make_environment openpi
install openpi --reinstall-package openvla openpi-client==0.1.2 pytest -e ".[libero,serve]"
unlock_environments
"$root/openpi/bin/python" -m pytest -q -m "not slow" tests/evaluation/test_remote_policy.py
