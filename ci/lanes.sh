#!/usr/bin/env bash
# Run what must hold on every supported transformers version, each in its own environment, and the towers against timm.
#   LANES="4.40.1 newest" bash ci/lanes.sh     only these
set -euo pipefail
cd "$(dirname "$0")/.."
lanes=${LANES:-4.40.1 4.49.0 4.57.6 newest}
root=$PWD/.lanes
mkdir -p "$root"

[ -x "$root/uv/bin/uv" ] || { "${PYTHON:-python3}" -m venv "$root/uv" && "$root/uv/bin/pip" install --quiet uv; }
# uv does not read pip's configuration; hand it the wheels that pip would find.
find_links=()
for key in :env:.find-links global.find-links user.find-links; do
  for place in $("$root/uv/bin/pip" config get "$key" 2>/dev/null || true); do find_links+=(--find-links "$place"); done
done

make_environment() {  # name, requirements...
  local python=$root/$1/bin/python
  [ -x "$python" ] || "$root/uv/bin/uv" venv --quiet --python "${PYTHON:-python3}" "$root/$1"
  "$root/uv/bin/uv" pip install --quiet --compile-bytecode --python "$python" "${find_links[@]}" -c ci/constraints.txt "${@:2}"
  "$root/uv/bin/uv" pip install --quiet --python "$python" "${find_links[@]}" --no-deps --reinstall -e .
}

for lane in $lanes; do
  started=$SECONDS
  case $lane in
    newest) packages=(transformers pillow) ;;
    4.40.1) packages=(transformers==4.40.1 "pillow<13") ;;  # where Pillow 13 resizes in another order of passes
    *) packages=("transformers==$lane" pillow) ;;
  esac
  # The optional packages where they work: today's peft from 4.46, bitsandbytes on a CPU from 4.53. accelerate, which
  # both need, is left out of 4.49: one lane shows what works without any of them.
  case $lane in
    4.40.1) packages+=(peft==0.11.1 accelerate==0.30.1) ;;
    4.49.0) ;;
    4.57.6) packages+=(peft accelerate bitsandbytes vla-eval) ;;  # the last that vla-eval's OpenVLA server runs on
    *) packages+=(peft accelerate bitsandbytes) ;;
  esac
  make_environment "$lane" torch numpy psutil pytest safetensors "${packages[@]}"
  "$root/$lane/bin/python" -c 'import PIL, torch, transformers as t; print(f"== transformers {t.__version__}, torch {torch.__version__}, Pillow {PIL.__version__}")'
  "$root/$lane/bin/python" -m pytest -q -m "lane and not slow and not gpu"
  rm -rf "$root/saved/$lane"
  "$root/$lane/bin/python" tests/exchange.py write "$root/saved/$lane" 2>/dev/null
  echo "== $((SECONDS - started)) s"
done

for lane in $lanes; do
  others=()
  for other in $lanes; do [ "$other" = "$lane" ] || others+=("$root/saved/$other/"*); done
  [ ${#others[@]} -eq 0 ] || "$root/$lane/bin/python" tests/exchange.py read "${others[@]}" 2>"$root/exchange.log" \
    || { tail -n 20 "$root/exchange.log" >&2; exit 1; }
done

for timm in ${TIMM_LANES-0.9.16 1.0.31}; do
  # timm cannot be imported without torchvision, whose only wheels are CUDA builds: tests/torchvision_beside_cpu_torch.py.
  make_environment "timm-$timm" torch numpy psutil pytest safetensors pillow transformers==4.57.6 "timm==$timm" torchvision==0.28.0
  echo "== timm $timm"
  "$root/timm-$timm/bin/python" -m pytest -q -m timm -p torchvision_beside_cpu_torch
done
