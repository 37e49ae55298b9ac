"""LIBERO's simulator (MuJoCo): found, or an error that says how to install it; suites, tasks, the robot's state."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .actions_openvla import nearest_name

INSTALL = "pip install 'openvla[libero]'"
INSTALL_RENDERER = "apt-get install -y libegl1 libgl1-mesa-dri libosmesa6 (or a GPU driver's own EGL)"
RENDERERS = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"}


def choose_renderer() -> str:
    """Tell MuJoCo how to render without a screen, unless ``MUJOCO_GL`` says it; to be called before it is imported.

    Returns:
        "egl", "osmesa", or what ``MUJOCO_GL`` says.

    Raises:
        ImportError: Its library is not installed.
    """
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if sys.platform != "linux":
        return chosen  # MuJoCo finds the system's own
    candidates = [chosen] if chosen else list(RENDERERS)
    for name in candidates:
        if name not in RENDERERS or _loads(RENDERERS[name]):
            os.environ["MUJOCO_GL"] = name
            os.environ.setdefault("PYOPENGL_PLATFORM", name)
            return name
    missing = " and ".join(RENDERERS[name] for name in candidates)
    asked = f"MUJOCO_GL={chosen} asks for it" if chosen else "one of them is needed"
    raise ImportError(f"No rendering without a screen: {missing} cannot be loaded; {asked}: {INSTALL_RENDERER}.")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def require_libero(module: str = "libero.libero.benchmark") -> Any:
    """A module of LIBERO.

    Raises:
        ImportError: LIBERO or its renderer is not installed; the message says what to run.
    """
    try:
        importlib.import_module("mujoco")
        choose_renderer()
        with contextlib.redirect_stdout(io.StringIO()):  # it greets
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"The LIBERO simulator is not installed (no module {error.name}): {INSTALL}") from error


def open_suite(name: str) -> Any:
    """A suite of tasks.

    Raises:
        ValueError: There is none of this name; the message lists what there is.
        ImportError: The simulator is not installed.
    """
    suites = require_libero().get_benchmark_dict()
    if name not in suites:
        known = sorted(suites)
        near = nearest_name(name, known)
        raise ValueError(f"Unknown suite {name!r}.{f' Did you mean {near!r}?' if near else ''} Allowed: {known}.")
    with contextlib.redirect_stdout(io.StringIO()):
        return suites[name]()


def parse_tasks(asked: Sequence[str | int] | None, suite: Any) -> list[int]:
    """Numbers of tasks, by number or by (part of) their name or instruction; all without any.

    Raises:
        ValueError: A task is unknown or not clear; the message lists what there is.
    """
    names = [suite.get_task(index).language for index in range(suite.n_tasks)]
    found = []
    for task in asked if asked is not None else range(len(names)):
        text = str(task).strip()
        if text.isdecimal() and int(text) < len(names):
            found.append(int(text))
            continue
        plain = text.replace("_", " ").lower()
        exact = [index for index, name in enumerate(names) if name.lower() == plain]
        fitting = exact or [index for index, name in enumerate(names) if plain in name.lower()]
        if len(fitting) != 1:
            how = "Unknown" if not fitting else f"More than one ({len(fitting)}) fits"
            listed = "".join(f"\n  {index}  {name}" for index, name in enumerate(names))
            raise ValueError(
                f"{how} task {text!r}. {type(suite).__name__} has, by number or a part of the name:{listed}"
            )
        found.append(fitting[0])
    return list(dict.fromkeys(found))


def make_environment(suite: Any, task_id: int, *, seed: int = 0, **settings: Any) -> Any:
    """The simulator with one task's scene, as ``OffScreenRenderEnv`` takes ``settings``.

    Raises:
        ImportError: It cannot render here.
    """
    environments = require_libero("libero.libero.envs")
    folder = require_libero("libero.libero").get_libero_path("bddl_files")
    task = suite.get_task(task_id)
    try:
        environment = environments.OffScreenRenderEnv(
            bddl_file_name=str(Path(folder) / task.problem_folder / task.bddl_file), **settings
        )
    except (ImportError, RuntimeError, AttributeError) as error:  # what MuJoCo's and PyOpenGL's loaders raise
        raise ImportError(
            f"The simulator cannot render with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}); try MUJOCO_GL=osmesa, or "
            f"{INSTALL_RENDERER}."
        ) from error
    environment.seed(seed)
    return environment


def end_effector_state(observation: dict[str, Any]) -> np.ndarray:
    """What OpenVLA-OFT calls proprio on LIBERO: position 3 (m), axis-angle 3 (rad), finger positions 2 (m); float64.

    The rotation is robosuite's: its angle lies in [0, 2 pi], not folded at pi, where the arm's usual pose is.
    """
    *axis, cosine = np.asarray(observation["robot0_eef_quat"], np.float64)
    cosine = min(1.0, max(-1.0, cosine))
    sine = math.sqrt(1.0 - cosine * cosine)
    rotation = np.zeros(3) if math.isclose(sine, 0.0) else np.array(axis) * 2.0 * math.acos(cosine) / sine
    return np.concatenate([observation["robot0_eef_pos"], rotation, observation["robot0_gripper_qpos"]])
