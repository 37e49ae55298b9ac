"""LIBERO's simulator (MuJoCo): found, or an error that says how to install it; suites, tasks, the robot's state."""

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
    raise OpenVLAImportError(f"No rendering without a screen: {missing} cannot be loaded; {asked}: {INSTALL_RENDERER}.")


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
        raise OpenVLAImportError(
            f"The LIBERO simulator is not installed (no module {error.name}): {INSTALL}"
        ) from error


# Suites whose demonstrations were recorded, and policies trained, with the words of the tasks' file names; their BDDL
# files word the tasks otherwise ("Pick the milk ..."). Every other suite changes something of these and keeps the names
# of the files, so that the words of its tasks stand in the BDDL files alone (Zxy-MLlab/LIBERO-PRO#27).
PLAIN_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90", "libero_100")
INSTRUCTION_SOURCES = ("file name", "BDDL")


def instruction_source(suite: str) -> str:
    """Return where the instructions of a suite's tasks come from, one of ``INSTRUCTION_SOURCES``."""
    return INSTRUCTION_SOURCES[suite not in PLAIN_SUITES]


def bddl_instruction(text: str, name: str = "the BDDL file") -> str:
    """Return the ``(:language ...)`` of a BDDL file as the simulator itself reads it: lower case, single spaces.

    Args:
        text: The file's content.
        name: Of the file, for the error.

    Raises:
        ValueError: It holds none, an empty one, or several.
    """
    found = re.findall(r"\(\s*:language\b([^()]*)\)", re.sub(r";.*", "", text), re.IGNORECASE)
    instructions = [" ".join(words.lower().split()) for words in found]
    if len(instructions) != 1 or not instructions[0]:
        raise OpenVLAValueError(
            f"{name} must hold one (:language ...) with the task's instruction, got {instructions or 'none'}; take "
            "another suite, or mend the file."
        )
    return instructions[0]


def bddl_file(task: Any) -> Path:
    """Return the path of a task's BDDL file."""
    return Path(require_libero("libero.libero").get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file


def open_suite(name: str) -> Any:
    """Open a suite of tasks, whose ``language`` is what a policy should be told (``instruction_source``).

    Raises:
        ValueError: There is none of this name, or it has no BDDL files; the message lists what there is.
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
        suite.tasks = [told_by_bddl(task, name) for task in suite.tasks]
    if not suite.tasks:
        raise OpenVLAValueError(f"{name} has no tasks in the installed LIBERO; take another suite.")
    return suite


def told_by_bddl(task: Any, suite: str) -> Any:
    """Return a LIBERO task with its BDDL file's instruction as ``language``.

    Raises:
        ValueError: The file is missing, or holds no instruction.
    """
    file = bddl_file(task)
    if not file.is_file():
        raise OpenVLAValueError(
            f"{suite} cannot be run: the installed LIBERO lacks its file {file}; take another suite."
        )
    return task._replace(language=bddl_instruction(file.read_text(encoding="utf-8"), str(file)))


def parse_tasks(asked: Sequence[str | int] | None, suite: Any) -> list[int]:
    """Return numbers of tasks, by number or by (part of) their instruction; all without any.

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
            raise OpenVLAValueError(
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
    try:
        environment = environments.OffScreenRenderEnv(
            bddl_file_name=str(bddl_file(suite.get_task(task_id))), **settings
        )
    except (ImportError, RuntimeError, AttributeError) as error:  # what MuJoCo's and PyOpenGL's loaders raise
        raise OpenVLAImportError(
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
