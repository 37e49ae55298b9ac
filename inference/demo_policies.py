"""The demonstration policies: in ``assets/`` of a clone, else in the distribution openvla-demo.

Their README.md describe training and success rates.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors_openvla import OpenVLAImportError


def _find(name: str) -> Path:
    """Return the folder of a policy; where it is not installed, the one that a clone would have."""
    clone = Path(__file__).resolve().parents[1] / "assets" / name
    spec = importlib.util.find_spec("openvla_demo")
    installed = [] if spec is None else [Path(folder) / name for folder in spec.submodule_search_locations or ()]
    return next((folder for folder in (clone, *installed) if folder.is_dir()), clone)


DEMO_POLICY = _find("libero")
DEMO_OFT_POLICY = _find("libero_oft")  # predicts action chunks; evaluated in float32
DEMO_NAME = "demo policy (4 M parameters, trained on two tasks of LIBERO-Object)"


def require_demo_policy() -> Path:
    """Return the folder of the demonstration policy.

    Raises:
        OpenVLAImportError: It is not installed.
    """
    if not DEMO_POLICY.is_dir():
        raise OpenVLAImportError(
            "The demo policy is not installed: pip install 'openvla[demo]' (in a clone: pip install ./assets). Or name "
            "a checkpoint: load_policy(DIR_OR_ID), --model DIR_OR_ID."
        )
    return DEMO_POLICY
