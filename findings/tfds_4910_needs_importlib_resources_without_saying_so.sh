#!/usr/bin/env bash
# tensorflow-datasets 4.9.10, etils 1.15.0, TensorFlow 2.21.0: no RLDS dataset can be written in a fresh environment.
#
# Robot datasets are written by a builder in a package of its own, as TFDS's guide lays it out.
#
# Expected: what `pip install tensorflow-datasets tensorflow` installs is enough.
# Seen: download_and_prepare() raises ModuleNotFoundError. TFDS uses importlib_resources on every Python but declares it
# for Python below 3.9 alone; etils, which brought it along until 1.13.0, no longer does. `pip install
# importlib_resources` helps.
#
# Output seen:
#   tensorflow-datasets 4.9.10 declares: importlib_resources; python_version < "3.9"
#   ModuleNotFoundError: No module named 'importlib_resources'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/robot"
touch "$folder/robot/__init__.py"
cat >"$folder/robot/robot_dataset_builder.py" <<'END'
import numpy as np
import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        steps = tfds.features.Dataset({"action": tfds.features.Tensor(shape=(7,), dtype=np.float32)})
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"steps": steps}))

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"steps": [{"action": np.zeros(7, np.float32)}] * 3}
END
cat >"$folder/try.py" <<'END'
import importlib.metadata
import sys

requirements = importlib.metadata.requires("tensorflow-datasets")
print("tensorflow-datasets 4.9.10 declares:", *(r for r in requirements if r.startswith("importlib")))
from robot.robot_dataset_builder import Builder

try:
    Builder(data_dir=sys.argv[1]).download_and_prepare()
    print("written")
except ModuleNotFoundError as error:
    print(f"ModuleNotFoundError: {error}")
END
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorflow-datasets==4.9.10 etils==1.15.0 tensorflow==2.21.0
cd "$folder"
CUDA_VISIBLE_DEVICES="" TF_CPP_MIN_LOG_LEVEL=3 PYTHONPATH=. "$folder/venv/bin/python" try.py "$folder/data" 2>"$folder/errors" \
  | grep -v ^Downloading | tee "$folder/output" || { cat "$folder/errors" >&2; exit 1; }
grep -q 'python_version < "3.9"' "$folder/output" && grep -q "No module named 'importlib_resources'" "$folder/output" \
  || { echo "changed: tensorflow-datasets and importlib_resources" >&2; exit 1; }
