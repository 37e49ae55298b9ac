#!/usr/bin/env bash
# Train on numbered batches under torchrun, accelerate and Ray, kill a process in each, continue, and count the batches:
# they must be those of one process, each trained on once.
#   bash ci/integration_ray_data.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/environment.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

lock_environments
make_environment ray_data
install ray_data torch psutil safetensors transformers pillow accelerate h5py "ray[data,train]" torchdata
install ray_data --no-deps --reinstall -e .
unlock_environments

bin=$root/ray_data/bin
examples=$PWD/examples
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"$bin/python" -c 'import ray, torch, torchdata; print(f"ray {ray.__version__}, torchdata {torchdata.__version__}, torch {torch.__version__}")'
"$bin/python" "$examples/toy.py" toy
arguments=(toy/data toy/base)
batches=64

check() {  # name: the batches of out/name are those of one process, each once
  cat "$1"/batches-*.jsonl | cut -d, -f1,2 | sort >"$1.txt"
  cmp one.txt "$1.txt" && echo "$1: $(sort -u "$1.txt" | wc -l) of $batches batches, each once, as in one process"
}

kill_when() {  # folder rank batches: kill the process of a rank when it has recorded so many batches
  local record=$1/batches-$2.jsonl
  until [ -f "$record" ] && [ "$(wc -l <"$record")" -ge "$3" ]; do sleep 0.05; done
  kill -9 "$(sed -n "${3}s/.*\"process\": \([0-9]*\).*/\1/p" "$record")"
  echo "$1: process of rank $2 killed after $3 of its batches"
}

"$bin/python" "$examples/stateful_loader.py" "${arguments[@]}" one --batches $batches >one.log 2>&1
cat one/batches-0.jsonl | cut -d, -f1,2 | sort >one.txt

interrupted() {  # name rank batches command...: run a command whose process is killed
  local name=$1 rank=$2 count=$3
  shift 3
  kill_when "$name" "$rank" "$count" &
  "$@" --batches $batches >"$name.log" 2>&1 && { echo "$name was not killed in time" >&2; exit 1; }
  wait $!
}

torchrun=("$bin/torchrun" --nproc-per-node 2 "$examples/stateful_loader.py" "${arguments[@]}")
interrupted torchrun 1 7 "${torchrun[@]}" torchrun --workers 2
"${torchrun[@]}" torchrun --workers 2 --batches $batches >>torchrun.log 2>&1
check torchrun

accelerate=("$bin/accelerate" launch --num_processes 2 --cpu "$examples/stateful_loader.py" "${arguments[@]}")
interrupted accelerate 0 9 "${accelerate[@]}" accelerate
"$bin/python" "$examples/stateful_loader.py" "${arguments[@]}" accelerate --workers 0 --batches $batches >>accelerate.log 2>&1
check accelerate  # continued by one process, not two

kill_when ray 1 7 &
"$bin/python" "$examples/ray_train.py" "${arguments[@]}" ray --train-workers 2 --batches $batches >ray.log 2>&1 \
  || { tail -n 40 ray.log >&2; exit 1; }
wait $!
check ray
