#!/usr/bin/env bash
# Let LeRobot itself open the datasets that openvla convert-data writes.
#   bash ci/integration_lerobot_data.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/environment.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

lock_environments
make_lerobot_environment integration-lerobot-data
export CONSTRAINTS=/dev/null  # they name a newer torch than LeRobot allows
install integration-lerobot-data "lerobot[dataset]==0.6.1" transformers accelerate psutil pytest google-crc32c h5py pyyaml zarr imagecodecs
install integration-lerobot-data --no-deps --reinstall -e .
unlock_environments
"$root/integration-lerobot-data/bin/python" -m pytest -q -rs tests/data/test_convert.py tests/data/test_replay_buffer.py
