#!/usr/bin/env bash
# gcsfs 2026.10.1: each first use of a bucket of another endpoint (http://, an emulator) waits for up to a minute.
#
# Whoever tests datasets on gs:// without Google's servers, as we do, sets endpoint_url (or STORAGE_EMULATOR_HOST).
#
# Expected: gcsfs speaks to that endpoint alone, as it is told, by HTTP, and answers at once.
# Seen: it first asks for the kind of bucket by gRPC with TLS at the same port, tries again for 60 s, logs "Could not
# determine bucket type ... falling back", and then works. GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false leaves that out.
#
# Output seen:
#   as installed: 2 bytes written and read after 140.9 s, warned: True
#   GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false: 2 bytes written and read after 0.1 s, warned: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'END'
import logging
import os
import socket
import sys
import time

from gcp_storage_emulator.server import create_server

warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("gcsfs").addHandler(handler)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
server = create_server("127.0.0.1", port, in_memory=True, default_bucket="robots")
server.start()

import gcsfs

files = gcsfs.GCSFileSystem(endpoint_url=f"http://127.0.0.1:{port}", token="anon")
start = time.monotonic()
files.pipe_file("robots/meta/info.json", b"{}")
data = files.cat_file("robots/meta/info.json")
seconds = time.monotonic() - start
warned = any("Could not determine bucket type" in text for text in warnings)
print(f"{sys.argv[1]}: {len(data)} bytes written and read after {seconds:.1f} s, warned: {warned}", flush=True)
os._exit(0 if (seconds > 30 and warned) == (sys.argv[1] == "as installed") else 1)
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gcsfs==2026.10.1 gcp-storage-emulator==2024.8.3
for setting in "as installed" GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false; do
  environment=()
  [ "$setting" = "as installed" ] || environment=("$setting")
  env "${environment[@]}" "$folder/venv/bin/python" "$folder/try.py" "$setting" 2>"$folder/errors" \
    || { tail -n 5 "$folder/errors" >&2; echo "changed: gcsfs and another endpoint" >&2; exit 1; }
done
