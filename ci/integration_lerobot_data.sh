#!/usr/bin/env bash
# Let LeRobot itself open the datasets that openvla convert-data writes (needs Python 3.12 or newer, as LeRobot 0.6).
#   PYTHON=python3.12 bash ci/integration_lerobot_data.sh
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD/.lanes
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
mkdir -p "$root"
exec 9>"$root/.environments.lock"  # as in ci/lane.sh: one installation at a time
flock 9
python=$root/lerobot_data/bin/python
[ -x "$root/uv/bin/uv" ] || { "${PYTHON:-python3}" -m venv "$root/uv" && "$root/uv/bin/pip" install --quiet uv; }
[ -x "$python" ] || "$root/uv/bin/uv" venv --quiet --python "${PYTHON:-python3}" "$root/lerobot_data"
install=("$root/uv/bin/uv" pip install --quiet --compile-bytecode --python "$python")
"${install[@]}" "lerobot[dataset]==0.6.1" transformers accelerate psutil pytest h5py pyyaml zarr imagecodecs
"${install[@]}" --no-deps --reinstall -e .
flock -u 9
"$python" -m pytest -q -rs tests/data/test_convert.py tests/data/test_replay_buffer.py
