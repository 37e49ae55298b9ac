#!/usr/bin/env bash
# Run the tests of the policy server's page in a headless Chromium; install missing packages where possible.
#   PYTHON=.venv/bin/python bash ci/browser.sh -k phone
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

found() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
if ! found >/dev/null; then
  root=()
  [ "$(id -u)" = 0 ] || root=(sudo -n)
  command -v apt-get >/dev/null && "${root[@]}" apt-get update -qq \
    && "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null \
    || { echo "No Chromium here, and apt-get could not install one; install chromium and run this again." >&2; exit 1; }
fi
"$python" -m pip install --quiet -c ci/constraints.txt playwright -e ".[serve,test]"
echo "== $("$(found)" --version 2>/dev/null)"
exec "$python" -m pytest -m browser "$@" tests/serving/test_page.py
