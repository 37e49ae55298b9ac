#!/usr/bin/env bash
# triton 3.9.0 (the newest on 2026-11-28; 3.6.0 too): a float32 division of a kernel is approximate on NVIDIA GPUs, exact in the interpreter.
#
# A kernel that divides two float32 numbers by "/" is compiled for an H100 (compute capability 9.0), which needs no GPU, and runs in
# Triton's interpreter on a CPU on 4096 random pairs, beside torch. A second kernel uses tl.div_rn.
#
# Expected: as in C++ for CUDA, in torch and in Python, "/" of two float32 numbers is rounded to nearest; or at least the interpreter,
#   which is there to test kernels, computes what the compiled kernel does.
# Seen: "/" becomes PTX's div.full.f32 (an error of up to 2 units in the last place); the interpreter gives torch's bits. So a kernel that
#   equals torch in every bit under the interpreter differs on a GPU. tl.div_rn becomes div.rn.f32. (tl.sqrt and tl.exp are approximate, too;
#   for these the documentation says "fast", or libdevice has the exact ones.)
#
# Output seen:
#   triton 3.9.0: "/" compiles to ['div.full.f32'], in the interpreter 0 of 4096 results differ from torch
#   triton 3.9.0: tl.div_rn compiles to ['div.rn.f32'], in the interpreter 0 of 4096 results differ from torch
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/kernels.py" <<'EOF2'
import triton
import triton.language as tl


@triton.jit
def plain(x, y, out, size: tl.constexpr):
    index = tl.arange(0, size)
    tl.store(out + index, tl.load(x + index) / tl.load(y + index))


@triton.jit
def rounded(x, y, out, size: tl.constexpr):
    index = tl.arange(0, size)
    tl.store(out + index, tl.div_rn(tl.load(x + index), tl.load(y + index)))
EOF2
cat >"$folder/compiled.py" <<'EOF2'
import json
import re

import kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

found = {}
for name in ("plain", "rounded"):
    signature = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "size": "constexpr"}
    source = ASTSource(fn=getattr(kernels, name), signature=signature, constexprs={(3,): 4096})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    found[name] = sorted(set(re.findall(r"div\.[\w.]+", ptx)))
print(json.dumps(found))
EOF2
cat >"$folder/interpreted.py" <<'EOF2'
import json
import sys

import kernels
import torch
import triton

found = json.loads(sys.argv[1])
x, y = torch.rand(2, 4096, generator=torch.Generator().manual_seed(0)) + 0.5
for name, label in (("plain", '"/"'), ("rounded", "tl.div_rn")):
    out = torch.empty(4096)
    getattr(kernels, name)[(1,)](x, y, out, 4096)
    differing = int((out != x / y).sum())
    print(f"triton {triton.__version__}: {label} compiles to {found[name]}, ", end="")
    print(f"in the interpreter {differing} of 4096 results differ from torch")
    if differing:
        sys.exit(1)
sys.exit(found != {"plain": ["div.full.f32"], "rounded": ["div.rn.f32"]})
EOF2
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.9.0 numpy
found=$("$folder/venv/bin/python" "$folder/compiled.py")
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/interpreted.py" "$found" || { echo "changed" >&2; exit 1; }
