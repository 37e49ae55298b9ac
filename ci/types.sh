#!/usr/bin/env bash
# Check the types of the whole package with mypy; with arguments, print only the errors in these files or folders.
#   bash ci/types.sh [PATH...]
# The repository's root is the package "openvla": a link of that name in .types/ lets mypy import it as users do.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
mkdir -p .types
ln -sfn .. .types/openvla
cd .types
status=0
"${MYPY:-$root/.venv/bin/mypy}" --config-file ../pyproject.toml --no-namespace-packages --cache-dir cache \
  --python-executable ../.venv/bin/python -p openvla >report || status=$?
if [ $# -eq 0 ]; then
  cat report
  exit $status
fi
! grep -F "$(printf 'openvla/%s\n' "$@")" report
