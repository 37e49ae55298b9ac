#!/usr/bin/env bash
# transformers 5.24.0, Pillow 13.0.0: a 16-bit grey picture is clipped to 255, not scaled: a depth camera's frame becomes white.
#
# A 16-bit PNG with the values 0, 255, 1000 and 65535, as depth cameras write them, goes through transformers' load_image.
#
# Expected: scaled to 8 bits (0, 0, 3, 255), or an error.
# Seen: the picture is converted to RGB with every value above 255 clipped to it, without a warning. Pillow's convert("RGB")
#   does that as well. A vision-language model then gets a white image.
#
# Output seen:
#   transformers 5.24.0, Pillow 13.0.0: I;16 0, 255, 1000, 65535 become RGB [0, 255, 255, 255]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/try.py" <<'END'
import sys

import numpy as np
import PIL
import transformers
from PIL import Image
from transformers.image_utils import load_image

path = sys.argv[1] + "/depth.png"
Image.fromarray(np.array([[0, 255, 1000, 65535]], np.uint16)).save(path)
picture = load_image(path)
seen = np.asarray(picture)[0, :, 0].tolist()
print(f"transformers {transformers.__version__}, Pillow {PIL.__version__}: ", end="")
print(f"{Image.open(path).mode} 0, 255, 1000, 65535 become {picture.mode} {seen}")
raise SystemExit(seen != [0, 255, 255, 255])
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 pillow==13.0.0 numpy==2.4.6
"$folder/venv/bin/python" "$folder/try.py" "$folder" || { echo "changed: what becomes of 16-bit pictures" >&2; exit 1; }
