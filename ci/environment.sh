# Functions for the scripts beside it that make environments of their own. They set first:
#   root    the folder of the environments
export PIP_DISABLE_PIP_VERSION_CHECK=1

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

make_environment() {  # environment: an empty one where there is none
  [ -x "$root/uv/bin/uv" ] || { "${PYTHON:-python3}" -m venv "$root/uv" && "$root/uv/bin/pip" install --quiet uv; }
  [ -x "$root/$1/bin/python" ] || "$root/uv/bin/uv" venv --quiet --python "${PYTHON:-python3}" "$root/$1"
}
