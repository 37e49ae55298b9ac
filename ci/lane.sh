#!/usr/bin/env bash
# Run the tests for every supported transformers version in one environment, and save folders for the others to load.
#   bash ci/lane.sh 4.57.6      a version of transformers
#   bash ci/lane.sh lerobot     the versions that LeRobot 0.6.1 pins
#   bash ci/lane.sh latest      the newest release of every dependency
#   bash ci/lane.sh prerelease  the same with the newest pre-release of transformers, where one is newer than its release
#   bash ci/lane.sh triton      the fused kernels in Triton's interpreter, and compiled for GPUs
#   bash ci/lane.sh timm-1.0.31 compare the vision towers with that timm
set -euo pipefail
cd "$(dirname "$0")/.."
lane=$1
. ci/environment.sh

# Optional packages: the newest peft needs transformers 4.46, bitsandbytes on a CPU 4.53. 4.49 goes without accelerate,
# which both need: that lane tests the package without any of them. torchao's weights are saved from transformers 5.0 on.
optional=(peft accelerate bitsandbytes)
case $lane in
  4.40.1) packages=(transformers==4.40.1 "pillow<13" peft==0.11.1 accelerate==0.30.1) ;;  # Pillow 13: other order of passes
  4.49.0) packages=(transformers==4.49.0 pillow) ;;
  4.57.6) packages=(transformers==4.57.6 pillow "${optional[@]}" vla-eval) ;;  # the last for vla-eval's OpenVLA server
  lerobot) packages=("transformers==5.5.4" "pillow<13" "huggingface-hub<2" "numpy<2.3" "${optional[@]}" torchao) ;;
  latest) packages=(--upgrade transformers pillow "${optional[@]}" torchao) ;;
  prerelease) packages=(--upgrade "transformers>=0.0.0rc0" pillow "${optional[@]}" torchao) ;;
  triton) packages=(transformers==5.24.0 pillow triton==3.6.0) ;;
  # timm imports torchvision, which has CUDA wheels only: tests/torchvision_beside_cpu_torch.py.
  timm-*) packages=(transformers==4.57.6 pillow "timm==${lane#timm-}" torchvision==0.28.0) ;;
  5.*) packages=("transformers==$lane" pillow "${optional[@]}" torchao) ;;
  *) packages=("transformers==$lane" pillow "${optional[@]}") ;;
esac
lock_environments
make_environment "$lane"
install "$lane" torch psutil pytest safetensors numpy "${packages[@]}"
install "$lane" --no-deps --reinstall -e .
unlock_environments
python=$root/$lane/bin/python
"$python" -c 'import PIL, torch, transformers as t; print(f"transformers {t.__version__}, torch {torch.__version__}, Pillow {PIL.__version__}")'
if [ "$lane" = prerelease ] && ! "$python" -c 'import sys, packaging.version as v, transformers as t; sys.exit(not v.parse(t.__version__).is_prerelease)'; then
  echo "no pre-release of transformers is newer than its release"
  exit
fi

case $lane in
  triton)
    "$python" -m pytest -q tests/inference/test_kernels.py
    TRITON_INTERPRET=1 "$python" -m pytest -q -m gpu tests/inference/test_kernels.py
    exit ;;
  timm-*) "$python" -m pytest -q -m timm -p torchvision_beside_cpu_torch; exit ;;
esac
"$python" -m pytest -q -m "lane and not slow and not surface and not gpu"
rm -rf "$root/saved/$lane"
"$python" tests/exchange.py write "$root/saved/$lane"
