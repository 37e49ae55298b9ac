#!/usr/bin/env bash
# torch 2.13.0 (CPU, oneMKL): the first torch.cos of a process may be wrong by 1e-4 in one thread's share, once.
#
# On a busy machine with two or more cores, processes start one after the other, and each takes the cosine of the same
# 358 x 64 angles twice, before any other computation.
#
# Expected: the same numbers both times, in every process.
# Seen: in 8 of 80 processes the rows of one thread (0 to 178 or 179 to 357) differ by up to 1.5e-4 in the first call; every later
#   call is right. oneMKL picks a function's kernel on its first call; threads that make it at the same time may get different ones
#   (https://github.com/pytorch/pytorch/issues/188792, open). A rotary embedding is such a first call: a model's first
#   forward pass then has other logits than its second. With one call of one element before
#   it, none of 64 processes differed, beside the 8 of 80 without.
#
# Output seen:
#   torch 2.13.0: process 23: first and second cos differ by 0.000151 in rows 1 to 178
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"; kill $(jobs -p) 2>/dev/null || true' EXIT
cat >"$folder/try.py" <<'EOF'
import torch

angles = torch.outer(torch.arange(358.0), 1 / 10000 ** (torch.arange(0, 128, 2) / 128))
hidden, weight = torch.ones(358, 512), torch.ones(2048, 512)
hidden @ weight.T  # starts the threads
first, second = angles.cos(), angles.cos()
rows = (first != second).any(-1).nonzero().flatten().tolist()
if rows:
    difference = float((first - second).abs().max())
    print(f"first and second cos differ by {difference:.6f} in rows {rows[0]} to {rows[-1]}")
EOF
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
for _ in $(seq "$(nproc)"); do (while :; do :; done) & done # a busy machine
for number in $(seq 400); do
  seen=$("$folder/venv/bin/python" "$folder/try.py")
  if [ -n "$seen" ]; then
    echo "torch 2.13.0: process $number: $seen"
    exit 0
  fi
done
echo "changed: 400 processes without a difference" >&2
exit 1
