#!/usr/bin/env bash
# Run the LeRobot plugin's tests against the real LeRobot, with the versions that it pins, and check the plugin's types.
#   bash ci/integration_lerobot.sh            every test
#   bash ci/integration_lerobot.sh -k resumed arguments go to pytest
#   PYTHON312=/opt/python3.12/bin/python bash ci/integration_lerobot.sh
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD/.lanes plugin=$PWD/integrations/lerobot_policy_openvla
environment=$root/integration-lerobot
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$root"

find_python() {  # LeRobot 0.6 needs Python 3.12
  local candidate
  for candidate in "${PYTHON312:-}" python3.12 python3.13 "$(pyenv root 2>/dev/null || true)"/versions/3.12.*/bin/python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "LeRobot needs Python 3.12 or newer, which is not here; install it, or name it: PYTHON312=/path/to/python." >&2
  return 1
}

# One installation at a time: every environment builds from the same source folder.
exec 9>"$root/.environments.lock"
flock 9
[ -x "$root/uv/bin/uv" ] || { "${PYTHON:-python3}" -m venv "$root/uv" && "$root/uv/bin/pip" install --quiet uv; }
if [ ! -x "$environment/bin/python" ]; then
  python=$(find_python)
  "$root/uv/bin/uv" venv --quiet --python "$python" "$environment"
fi
# The constraints of the other environments name a newer torch than LeRobot allows.
"$root/uv/bin/uv" pip install --quiet --compile-bytecode --python "$environment/bin/python" \
  "lerobot==0.6.1" "$(grep ^mypy== ci/constraints.txt)" -e ".[lora,train]" -e "$plugin[test]"
flock -u 9

"$environment/bin/python" -c 'import lerobot, torch, transformers as t; print(f"lerobot {lerobot.__version__}, transformers {t.__version__}, torch {torch.__version__}")'
cd "$plugin"
"$environment/bin/python" -m mypy --config-file ../../pyproject.toml --python-version 3.12 src
"$environment/bin/python" -m pytest -q "$@"
