#!/usr/bin/env bash
# Run examples/ray_serve.py on Ray Serve itself: two replicas on loopback, every action compared, a replica killed.
#   bash ci/integration_ray_serve.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. ci/environment.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

lock_environments
make_environment ray_serve
install ray_serve --reinstall-package openvla "ray[serve]==2.60.0" -e .
unlock_environments
"$root/ray_serve/bin/python" examples/ray_serve.py --requests 100
"$root/ray_serve/bin/python" examples/ray_serve.py --requests 100 --kill
