#!/usr/bin/env bash
# Run the model server of integrations/vla_eval by vla-eval's own commands, beside vla-eval's own OpenVLA server with its
# transformers 4.40.1, and in the LIBERO simulator beside openvla evaluate. Environments: .lanes/vla-eval*.
#   bash ci/integration_vla_eval.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/environment.sh

lock_environments
make_environment vla-eval
install vla-eval --reinstall-package openvla -e ".[libero]"
make_environment vla-eval-4.40.1
install vla-eval-4.40.1 vla-eval torch transformers==4.40.1 tokenizers==0.19.1 "pillow<13" accelerate==0.30.1
unlock_environments

# vla-eval serve builds the server's environment with uv; here with the releases that the other environments have.
mkdir -p "$root/vla-eval/server"
constraints=$(sed -nE 's/^([a-z]+==[0-9.]+)$/"\1", /p' "${CONSTRAINTS:-ci/constraints.txt}")
sed -e "s|path = \"../..\"|path = \"$PWD\"|" \
  -e "s|^# \[tool.uv.sources\]|# [tool.uv]\n# constraint-dependencies = [${constraints//$'\n'/}]\n#\n&|" \
  integrations/vla_eval/openvla_server.py >"$root/vla-eval/server/openvla_server.py"
UV_FIND_LINKS=$(find_links | tr ' \n' ',,') PATH="$root/uv/bin:$root/vla-eval/bin:$PATH" \
  "$root/vla-eval/bin/python" integrations/vla_eval/check.py "$root/vla-eval/server/openvla_server.py" \
  "$root/vla-eval-4.40.1/bin/python"
