#!/usr/bin/env bash
# Run every lane (ci/lane.sh), two at a time, and let every transformers version load the folders that the others wrote.
#   LANES="4.40.1 latest" bash ci/lanes.sh     only these
set -uo pipefail
cd "$(dirname "$0")/.."
lanes=${LANES:-4.40.1 4.49.0 4.57.6 lerobot 5.23.0 5.24.0 latest}
other_lanes=${OTHER_LANES-timm-0.9.16 timm-1.0.31 triton prerelease}  # these write no folders
root=$PWD/.lanes
mkdir -p "$root/logs"
# Two lanes share two cores; more threads would wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

run_lane() {
  local started=$SECONDS status=0
  bash ci/lane.sh "$1" >"$root/logs/$1.log" 2>&1 || status=$?
  { echo "== $1: $([ $status -eq 0 ] && echo passed || echo FAILED), $((SECONDS - started)) s"
    grep -E '^(transformers |no pre-release|FAILED|ERROR)|(passed|failed|error).* in ' "$root/logs/$1.log"
    [ $status -eq 0 ] || { echo "-- the end of $root/logs/$1.log"; tail -n 40 "$root/logs/$1.log"; }; } || true
  [ "$1" = prerelease ] || return $status  # not a release yet: its failure is reported and does not count
}
export -f run_lane
export root

printf '%s\n' $lanes $other_lanes | xargs -P "${JOBS:-2}" -I{} bash -c 'run_lane {}' || exit 1

for lane in $lanes; do
  others=()
  for other in $lanes; do [ "$other" = "$lane" ] || others+=("$root/saved/$other/"*); done
  [ ${#others[@]} -eq 0 ] || "$root/$lane/bin/python" tests/exchange.py read "${others[@]}" 2>"$root/logs/exchange.log" \
    || { tail -n 20 "$root/logs/exchange.log" >&2; exit 1; }
done
