#!/usr/bin/env bash
# Run the LeRobot plugin's tests against the real LeRobot, with the versions that it pins, and check the plugin's types.
#   bash ci/integration_lerobot.sh            every test
#   bash ci/integration_lerobot.sh -k resumed arguments go to pytest
#   PYTHON312=/opt/python3.12/bin/python bash ci/integration_lerobot.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/environment.sh
plugin=$PWD/integrations/lerobot_policy_openvla
python=$root/integration-lerobot/bin/python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

lock_environments
make_lerobot_environment integration-lerobot
# The constraints of the other environments name a newer torch than LeRobot allows.
CONSTRAINTS=/dev/null install integration-lerobot \
  "lerobot==0.6.1" "$(grep ^mypy== ci/constraints.txt)" -e ".[lora,train]" -e "$plugin[test]"
unlock_environments

"$python" -c 'import lerobot, torch, transformers as t; print(f"lerobot {lerobot.__version__}, transformers {t.__version__}, torch {torch.__version__}")'
cd "$plugin"
"$python" -m mypy --config-file ../../pyproject.toml --python-version 3.12 src
"$python" -m pytest -q "$@"
