"""Mixtures of Open X-Embodiment datasets by name, with the reference's weights (openvla's oxe/mixtures.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..actions_openvla import nearest_name
from ..errors_openvla import OpenVLAFileNotFoundError, OpenVLAValueError
from .presets import PRESETS
from .remote import is_remote

_SUFFIX = "_converted_externally_to_rlds"

_RTX = {
    "fractal20220817_data": 0.54087122203,
    "kuka": 0.8341046294,
    "bridge_orig": 1.0,
    "taco_play": 2.0,
    "jaco_play": 2.0,
    "berkeley_cable_routing": 3.0,
    "roboturk": 1.0,
    "viola": 2.0,
    "berkeley_autolab_ur5": 1.0,
    "toto": 1.0,
}
_FRANKA = {
    f"stanford_hydra_dataset{_SUFFIX}": 1.0,
    f"austin_buds_dataset{_SUFFIX}": 3.0,
    f"nyu_franka_play_dataset{_SUFFIX}": 3.0,
    f"maniskill_dataset{_SUFFIX}": 0.1,
    f"furniture_bench_dataset{_SUFFIX}": 0.1,
    f"cmu_franka_exploration_dataset{_SUFFIX}": 5.0,
    f"austin_sailor_dataset{_SUFFIX}": 1.0,
    f"austin_sirius_dataset{_SUFFIX}": 1.0,
    f"berkeley_rpt{_SUFFIX}": 1.0,
    f"kaist_nonprehensile{_SUFFIX}": 3.0,
    f"stanford_robocook{_SUFFIX}": 1.0,
    f"iamlab_cmu_pickup_insert{_SUFFIX}": 1.0,
    "utaustin_mutex": 1.0,
    "cmu_play_fusion": 1.0,
}
_MAGIC_SOUP = {
    **_RTX,
    "jaco_play": 1.0,
    "berkeley_cable_routing": 1.0,
    "roboturk": 2.0,
    "berkeley_autolab_ur5": 2.0,
    "language_table": 0.1,
    f"stanford_hydra_dataset{_SUFFIX}": 2.0,
    f"austin_buds_dataset{_SUFFIX}": 1.0,
    f"nyu_franka_play_dataset{_SUFFIX}": 3.0,
    f"furniture_bench_dataset{_SUFFIX}": 0.1,
    f"ucsd_kitchen_dataset{_SUFFIX}": 2.0,
    f"austin_sailor_dataset{_SUFFIX}": 1.0,
    f"austin_sirius_dataset{_SUFFIX}": 1.0,
    f"dlr_edan_shared_control{_SUFFIX}": 1.0,
    f"iamlab_cmu_pickup_insert{_SUFFIX}": 1.0,
    "utaustin_mutex": 1.0,
    "berkeley_fanuc_manipulation": 2.0,
    "cmu_stretch": 1.0,
}
_NEW = {"bc_z": 0.2, "fmb_dataset": 1.0, "dobbe": 0.2}
_WITHOUT_LANGUAGE_TABLE = {name: weight for name, weight in _MAGIC_SOUP.items() if name != "language_table"}

# Weights by dataset; relative to the datasets' numbers of steps, as the streams take them.
MIXTURES: dict[str, dict[str, float]] = {
    "bridge": {"bridge_orig": 1.0},
    "bridge_rt_1": {"bridge_orig": 1.0, "fractal20220817_data": 1.0},
    "rtx": _RTX,
    "rtx_franka": {**_RTX, **_FRANKA},
    "oxe_magic_soup": _MAGIC_SOUP,
    "oxe_magic_soup_plus": {**_MAGIC_SOUP, **_NEW, "droid": 0.06},
    "oxe_magic_soup_plus_minus": {**_WITHOUT_LANGUAGE_TABLE, **_NEW, "fractal20220817_data": 1.0},
    "libero_mix": {f"libero_{suite}_no_noops": 1.0 for suite in ("spatial", "object", "goal", "10")},
}


def mixture_entries(
    name: str, root: str | Path, leave_out: Sequence[str] = (), fields: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return the datasets of a mixture as entries of ``FinetuneConfig.data``: path, name and weight of each.

    If presets differ in cameras or proprio, ``fields`` selects the main camera and no proprio, as the reference trains
    OpenVLA on mixtures: a batch needs samples of one layout.

    Args:
        name: A key of ``MIXTURES``.
        root: The folder with one folder for each dataset, by its name; or its URL.
        leave_out: Datasets of the mixture that are not used.
        fields: Fields of every dataset, in place of its preset's, such as ``{"cameras": ["observation.image"]}``.

    Raises:
        OpenVLAValueError: There is no such mixture, or ``leave_out`` names a dataset that is not in it.
        OpenVLAFileNotFoundError: Datasets are missing below the folder. Remote ones are missed when they are opened.
    """
    if name not in MIXTURES:
        nearest = nearest_name(name, list(MIXTURES))
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        raise OpenVLAValueError(f"Unknown mixture {name!r}.{hint} Allowed: {list(MIXTURES)}.")
    if unknown := sorted(set(leave_out) - set(MIXTURES[name])):
        raise OpenVLAValueError(f"leave_out names {unknown}, which are not in {name!r}: {list(MIXTURES[name])}.")
    weights = {key: weight for key, weight in MIXTURES[name].items() if key not in leave_out}
    if is_remote(root):
        root = str(root).rstrip("/")
        paths = {key: f"{root}/{key}" for key in weights}
    else:
        root = Path(root).expanduser()
        paths = {key: str(root / key) for key in weights}
        if missing := [key for key in weights if not (root / key).exists()]:
            raise OpenVLAFileNotFoundError(
                f"{root} lacks {len(missing)} of the {len(weights)} datasets of {name!r}: {missing}. Download them "
                "there, or name them in leave_out."
            )
    presets = {key: PRESETS[key] for key in weights if key in PRESETS}
    differ = len({(preset.cameras, preset.proprio) for preset in presets.values()}) > 1
    common = {key: {"cameras": preset.cameras[:1], "proprio": ()} for key, preset in presets.items() if differ}
    entries = []
    for key, weight in weights.items():
        chosen = {**common.get(key, {}), **(fields or {})}
        entries.append({"path": paths[key], "name": key, "weight": weight, **({"fields": chosen} if chosen else {})})
    return entries


def expanded_entries(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return entries of ``FinetuneConfig.data`` with ``{mixture: NAME, path: ROOT, ...}`` replaced.

    The entry of a mixture may have ``leave_out`` and ``fields``, as ``mixture_entries`` takes them.

    Raises:
        OpenVLAValueError: As ``mixture_entries``; or the entry of a mixture has other keys.
    """
    expanded: list[dict[str, Any]] = []
    for entry in entries:
        if "mixture" not in entry:
            expanded.append(dict(entry))
            continue
        if other := sorted(set(entry) - {"mixture", "path", "leave_out", "fields"}) or ["path"] * ("path" not in entry):
            raise OpenVLAValueError(
                f"The entry of a mixture takes mixture, path, leave_out and fields; got {dict(entry)}: check {other}."
            )
        expanded += mixture_entries(entry["mixture"], entry["path"], entry.get("leave_out") or (), entry.get("fields"))
    return expanded
