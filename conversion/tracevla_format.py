"""TraceVLA's checkpoints: OpenVLA's layout and one more tensor, which no field of their config.json tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..configuration_openvla import OpenVLAConfig
from ..prismatic_openvla import SEPARATOR


def with_trace_prompting(fields: Mapping[str, Any], tensor_names: Iterable[str]) -> dict[str, Any]:
    """Return the fields of a config.json, with ``trace_prompting`` where the weights are those of a TraceVLA.

    Args:
        fields: Fields of config.json.
        tensor_names: Names of the tensors beside it, as on the Hub or in a native run (the separator's is the same).
    """
    is_tracevla = SEPARATOR in set(tensor_names) and fields.get("model_type") == OpenVLAConfig.model_type
    return {**fields, "trace_prompting": True} if is_tracevla else dict(fields)
