"""The LIBERO simulator (MuJoCo): renderer, task suites, tasks, environments, the robot's state."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..actions_openvla import nearest_name
from ..errors_openvla import OpenVLAImportError, OpenVLAValueError

INSTALL = "pip install 'openvla[libero]'"
INSTALL_RENDERER = "apt-get install -y libegl1 libgl1-mesa-dri libosmesa6 (or a GPU driver's own EGL)"
RENDERERS = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"}


def choose_renderer() -> str:
    """Set ``MUJOCO_GL`` to a renderer that works without a screen, unless it is set; call before MuJoCo is imported.

    Returns:
        "egl", "osmesa", or the value of ``MUJOCO_GL``.

    Raises:
        ImportError: The renderer's library is not installed.
    """
    requested = os.environ.get("MUJOCO_GL", "").lower()
    if sys.platform != "linux":
        return requested  # MuJoCo finds the system's renderer
    candidates = [requested] if requested else list(RENDERERS)
    for name in candidates:
        if name not in RENDERERS or _can_load(RENDERERS[name]):
            os.environ["MUJOCO_GL"] = name
            os.environ.setdefault("PYOPENGL_PLATFORM", name)
            return name
    missing = " and ".join(RENDERERS[name] for name in candidates)
    reason = f"MUJOCO_GL={requested} requires it" if requested else "one of them is needed"
    raise OpenVLAImportError(
        f"No rendering without a screen: {missing} cannot be loaded; {reason}: {INSTALL_RENDERER}."
    )


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def require_libero(module: str = "libero.libero.benchmark") -> Any:
    """Import and return a module of LIBERO.

    Raises:
        ImportError: LIBERO or its renderer is not installed; the message says how to install it.
    """
    try:
        importlib.import_module("mujoco")
        choose_renderer()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a greeting
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise OpenVLAImportError(
            f"The LIBERO simulator is not installed (no module {error.name}): {INSTALL}"
        ) from error


# Suites whose policies are trained with the instructions of the tasks' file names; their BDDL files word the tasks
# differently ("Pick the milk ..."). Other suites perturb these and keep the file names, so that the instructions of
# their tasks are in the BDDL files only (Zxy-MLlab/LIBERO-PRO#27).
PLAIN_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90", "libero_100")
INSTRUCTION_SOURCES = ("file name", "BDDL")


def instruction_source(suite: str) -> str:
    """Return the source of the instructions of a suite's tasks, one of ``INSTRUCTION_SOURCES``."""
    return INSTRUCTION_SOURCES[suite not in PLAIN_SUITES]


def bddl_instruction(text: str, name: str = "the BDDL file") -> str:
    """Return the ``(:language ...)`` of a BDDL file as the simulator parses it: lower case, single spaces.

    Args:
        text: Content of the file.
        name: Name of the file, for the error message.

    Raises:
        ValueError: The file has no instruction, an empty one, or several.
    """
    matches = re.findall(r"\(\s*:language\b([^()]*)\)", re.sub(r";.*", "", text), re.IGNORECASE)
    instructions = [" ".join(words.lower().split()) for words in matches]
    if len(instructions) != 1 or not instructions[0]:
        raise OpenVLAValueError(
            f"{name} must hold one (:language ...) with the task's instruction, got {instructions or 'none'}; take "
            "another suite, or correct the file."
        )
    return instructions[0]


def bddl_file(task: Any) -> Path:
    """Return the path of a task's BDDL file."""
    return Path(require_libero("libero.libero").get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file


def open_suite(name: str) -> Any:
    """Open a task suite; the ``language`` of its tasks is the instruction for a policy (``instruction_source``).

    Raises:
        ValueError: The suite is unknown (the message lists the known ones), or has no tasks or BDDL files.
        ImportError: The simulator is not installed.
    """
    suites = require_libero().get_benchmark_dict()
    if name not in suites:
        known = sorted(suites)
        near = nearest_name(name, known)
        raise OpenVLAValueError(
            f"Unknown suite {name!r}.{f' Did you mean {near!r}?' if near else ''} Allowed: {known}."
        )
    with contextlib.redirect_stdout(io.StringIO()):
        suite = suites[name]()
    if instruction_source(name) == "BDDL":
        suite.tasks = [with_bddl_instruction(task, name) for task in suite.tasks]
    if not suite.tasks:
        raise OpenVLAValueError(f"{name} has no tasks in the installed LIBERO; take another suite.")
    return suite


def with_bddl_instruction(task: Any, suite: str) -> Any:
    """Return a LIBERO task with its BDDL file's instruction as ``language``.

    Raises:
        ValueError: The file is missing, or has no instruction.
    """
    file = bddl_file(task)
    if not file.is_file():
        raise OpenVLAValueError(
            f"{suite} cannot be run: the installed LIBERO lacks its file {file}; take another suite."
        )
    return task._replace(language=bddl_instruction(file.read_text(encoding="utf-8"), str(file)))


def parse_tasks(tasks: Sequence[str | int] | None, suite: Any) -> list[int]:
    """Return task numbers for numbers, instructions or parts of instructions; None is all tasks.

    Raises:
        ValueError: A task is unknown or ambiguous; the message lists the tasks.
    """
    names = [suite.get_task(index).language for index in range(suite.n_tasks)]
    task_ids = []
    for task in tasks if tasks is not None else range(len(names)):
        text = str(task).strip()
        if text.isdecimal() and int(text) < len(names):
            task_ids.append(int(text))
            continue
        plain = text.replace("_", " ").lower()
        exact = [index for index, name in enumerate(names) if name.lower() == plain]
        matches = exact or [index for index, name in enumerate(names) if plain in name.lower()]
        if len(matches) != 1:
            problem = "Unknown" if not matches else f"More than one ({len(matches)}) fits"
            listed = "".join(f"\n  {index}  {name}" for index, name in enumerate(names))
            raise OpenVLAValueError(
                f"{problem} task {text!r}. {type(suite).__name__} has, by number or a part of the name:{listed}"
            )
        task_ids.append(matches[0])
    return list(dict.fromkeys(task_ids))


def make_environment(suite: Any, task_id: int, *, seed: int = 0, **settings: Any) -> Any:
    """Return the simulator with the scene of one task.

    Args:
        suite: Task suite of ``open_suite``.
        task_id: Number of the task.
        seed: Seed of the environment.
        **settings: Arguments of LIBERO's ``OffScreenRenderEnv``.

    Raises:
        ImportError: The simulator cannot render on this machine.
    """
    environments = require_libero("libero.libero.envs")
    try:
        environment = environments.OffScreenRenderEnv(
            bddl_file_name=str(bddl_file(suite.get_task(task_id))), **settings
        )
    except (ImportError, RuntimeError, AttributeError) as error:  # raised by MuJoCo's and PyOpenGL's loaders
        raise OpenVLAImportError(
            f"The simulator cannot render with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}); try MUJOCO_GL=osmesa, or "
            f"{INSTALL_RENDERER}."
        ) from error
    environment.seed(seed)
    return environment


def end_effector_state(observation: dict[str, Any]) -> np.ndarray:
    """Return OpenVLA-OFT's proprio for LIBERO: position 3 (m), axis-angle 3 (rad), finger positions 2 (m).

    Returns:
        float64 ``(8,)``. The rotation is robosuite's: its angle is in [0, 2 pi], not wrapped at pi, where the arm's
        usual pose is.
    """
    *axis, cosine = np.asarray(observation["robot0_eef_quat"], np.float64)
    cosine = min(1.0, max(-1.0, cosine))
    sine = math.sqrt(1.0 - cosine * cosine)
    rotation = np.zeros(3) if math.isclose(sine, 0.0) else np.array(axis) * 2.0 * math.acos(cosine) / sine
    return np.concatenate([observation["robot0_eef_pos"], rotation, observation["robot0_gripper_qpos"]])
