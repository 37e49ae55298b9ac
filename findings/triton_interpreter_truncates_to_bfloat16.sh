#!/usr/bin/env bash
# triton 3.9.0 (the newest on 2026-11-28; 3.6.0 too): the interpreter truncates float32 to bfloat16, whatever rounding is asked for.
#
# Under TRITON_INTERPRET=1 a kernel casts 1024 float32 numbers to bfloat16, once as it is and once with
# fp_downcast_rounding="rtne".
#
# Expected: round to nearest, ties to even, as torch and as the compiled kernel; "rtne" says so by name.
# Seen: both casts drop the lower 16 bits: about half of the numbers (of one seed 499 of 1024) are one step too near to zero.
#   A kernel that is tested against torch in bfloat16 under the interpreter so fails by one step where it would be right on a GPU,
#   or a test gets a tolerance that hides errors. Rounding by integer arithmetic on the bits gives torch's numbers in both.
#   (That arithmetic on bfloat16 itself is not supported by the interpreter is documented.)
#
# Output seen:
#   triton 3.9.0: default: 499 of 1024 differ from torch, all truncated: True
#   triton 3.9.0: rtne: 499 of 1024 differ from torch, all truncated: True
#   triton 3.9.0: rounded on the bits: 0 of 1024 differ from torch
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'EOF2'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def cast(source, target, size: tl.constexpr, mode: tl.constexpr):
    index = tl.arange(0, size)
    x = tl.load(source + index)
    if mode == "default":
        y = x.to(tl.bfloat16)
    elif mode == "rtne":
        y = x.to(tl.bfloat16, fp_downcast_rounding="rtne")
    else:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        y = bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    tl.store(target + index, y)


x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
truncated = (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
counts = {}
for mode in ("default", "rtne", "bits"):
    y = torch.empty(1024, dtype=torch.bfloat16)
    cast[(1,)](x, y, 1024, mode)
    counts[mode] = int((y != x.bfloat16()).sum())
    if mode == "bits":
        print(f"triton {triton.__version__}: rounded on the bits: {counts[mode]} of 1024 differ from torch")
    else:
        same = bool(torch.equal(y, truncated))
        print(f"triton {triton.__version__}: {mode}: {counts[mode]} of 1024 differ from torch, all truncated: {same}")
sys.exit(not (counts["default"] == counts["rtne"] > 400 and counts["bits"] == 0))
EOF2
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.9.0 numpy
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/try.py" || { echo "changed" >&2; exit 1; }
