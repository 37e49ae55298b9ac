#!/usr/bin/env bash
# What PyPI gets, in dist/: the wheels and sources of openvla and openvla-demo, checked, installed and run, and the SBOM.
set -euo pipefail
cd "$(dirname "$0")/.."
MAX_WHEEL_BYTES=2000000
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet build cyclonedx-bom twine
rm -rf dist
git archive HEAD | tar -x -C "$(mkdir "$work/source" && echo "$work/source")"  # what is committed, and nothing else
for project in "$work/source" "$work/source/assets"; do
  "$work/tools/bin/python" -m build --quiet --outdir dist "$project"
done
"$work/tools/bin/twine" check --strict dist/*.whl dist/*.tar.gz
wheel=$(echo dist/openvla-[0-9]*.whl)
bytes=$(stat --format %s "$wheel")
[ "$bytes" -le "$MAX_WHEEL_BYTES" ] || { echo "$wheel has $bytes bytes, more than $MAX_WHEEL_BYTES"; exit 1; }

"${PYTHON:-python3}" -m venv "$work/user"
"$work/user/bin/pip" install --quiet -c ci/constraints.txt "$wheel[plot]"
cd "$work"
if user/bin/openvla predict 2> error; then echo "the demo policy is not installed, and predict ran"; exit 1; fi
grep -q "pip install 'openvla\[demo\]'" error
user/bin/pip install --quiet "$OLDPWD"/dist/openvla_demo-*.whl
user/bin/openvla predict --plot demo.png
cd "$OLDPWD"
"$work/tools/bin/cyclonedx-py" environment --output-reproducible --of JSON -o dist/openvla.cdx.json "$work/user/bin/python"
ls -l dist
echo "openvla's wheel: $bytes bytes"
