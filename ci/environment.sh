# Functions for the scripts beside it that make environments of their own, in .lanes, which they call root:
#   lock_environments; make_environment NAME; install NAME requirements...; unlock_environments
root=$PWD/.lanes
export PIP_DISABLE_PIP_VERSION_CHECK=1

lock_environments() {  # one installation at a time: every environment builds from the same source folder
  mkdir -p "$root"
  exec 9>"$root/.environments.lock"
  flock 9
}

unlock_environments() { flock -u 9; }

find_links() {  # the folders of wheels in pip's configuration, which uv does not read
  local key
  for key in :env:.find-links global.find-links user.find-links; do
    "$root/uv/bin/pip" config get "$key" 2>/dev/null || true
  done
}

install() {  # environment requirements...
  local environment=$1 links=() link
  shift
  for link in $(find_links); do links+=(--find-links "$link"); done
  "$root/uv/bin/uv" pip install --quiet --compile-bytecode --python "$root/$environment/bin/python" "${links[@]}" \
    -c "${CONSTRAINTS:-ci/constraints.txt}" "$@"
}

make_environment() {  # environment [python]: an empty one where there is none
  [ -x "$root/uv/bin/uv" ] || { "${PYTHON:-python3}" -m venv "$root/uv" && "$root/uv/bin/pip" install --quiet uv; }
  [ -x "$root/$1/bin/python" ] || "$root/uv/bin/uv" venv --quiet --python "${2:-${PYTHON:-python3}}" "$root/$1"
}

make_lerobot_environment() {  # environment: an empty one of Python 3.12 or newer, which LeRobot 0.6 needs
  local candidate
  for candidate in "${PYTHON312:-}" "${PYTHON:-python3}" python3.12 python3.13 "$(pyenv root 2>/dev/null || true)"/versions/3.12.*/bin/python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
      make_environment "$1" "$(command -v "$candidate")"
      return
    fi
  done
  echo "LeRobot needs Python 3.12 or newer, which is not here; install it, or name it: PYTHON312=/path/to/python." >&2
  return 1
}
