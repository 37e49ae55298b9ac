"""Scripted demonstrations of LIBERO's pick-and-place tasks, as a LeRobot v3 dataset.

    pip install 'openvla[libero,train]'
    MUJOCO_GL=egl PYOPENGL_PLATFORM=egl python examples/collect_libero.py demos/libero_object_no_noops --episodes 120

A scripted expert that knows the positions of the objects moves the arm; the camera images and the expert's commands
are stored. Columns and conventions are those of the published LIBERO demonstrations without no-ops, so the preset
``libero_object_no_noops`` reads them (it is chosen by the folder's name): frames turned upright, the state
``[position 3 (m), axis-angle 3 (rad), fingers 2 (m)]``, the action as the simulator takes it, its gripper -1 open and
+1 close; the preset makes that OpenVLA's 1 open and 0 closed. Images are JPEG as in the published files, which
``image_preset="libero"`` repeats in evaluation.

Failed attempts are left out and counted. An interrupted collection can be continued.

With ``--policy`` a trained policy executes the first part of every further attempt, and the expert the rest; the stored
actions are the expert's throughout, so that the next training learns to recover from this policy's own mistakes
(DAgger: Ross, Gordon and Bagnell 2011).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from openvla.configuration_openvla import OpenVLAConfig, write_json
from openvla.data.lerobot_writer import LeRobotWriter
from openvla.data.utils import read_json
from openvla.evaluation.simulator import end_effector_state, make_environment, open_suite, parse_tasks
from openvla.inference.action_queue import ActionQueue
from openvla.inference.policy import Policy, load_policy
from openvla.inference.robot_conventions import convert_action
from PIL import Image
from tqdm import tqdm

CONTROL_HZ = 20
MOVING_STEPS = 30  # to another start
SETTLING_STEPS = 10  # as in evaluation: objects fall into place
SIZE = 256
JPEG_QUALITY = 95  # TensorFlow's, with which the published demonstrations were stored
CAMERAS = {"observation.image": "agentview", "observation.wrist_image": "robot0_eye_in_hand"}
ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
STATE_NAMES = ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right")
OPEN, CLOSE = -1.0, 1.0
# Of what is stored. What differs between attempts without a reason to be seen is not to be learnt; and a model that
# takes the most probable token needs few: spread over many, the phase that moves loses to the one that stands still.
SPEED, GAIN = 0.9, 17.0
SPEEDS = np.array([0.0, 0.1, 0.3, 0.9])
NEXT_SPEED_FROM = np.array([0.05, 0.1732, 0.52])  # half of the slowest, then geometric means
STAY = np.array([0.0] * 6 + [OPEN])
ELSEWHERE = 0.6  # share of the attempts that start elsewhere than evaluation does
MOVED_FROM = 2  # passes over the initial states that leave things where they are; later ones move every thing
DRIVEN_STEPS = (20, 140)  # by a policy, before the oracle takes over
MOVED_BY = 0.015  # m; LIBERO-Object itself places things within squares of 0.05 m, which lie as close to each other


class Oracle:
    """Expert that moves towards the goal of the current part of the task from any position, so that it recovers.

    Heights and speeds are drawn for each attempt; the stored command has one of a few speeds.

    Args:
        target: Name of the object to pick up.
        basket: Name of the object to place it in.
        rng: Chooses heights and speeds.
        as_stored: Move as what is stored says.
    """

    def __init__(self, target: str, basket: str, rng: np.random.Generator, as_stored: bool = False) -> None:
        self.target, self.basket = f"{target}_pos", f"{basket}_pos"
        self.speed, self.gain = rng.uniform(0.8, 1.0), rng.uniform(14, 20)
        self.as_stored = as_stored
        self.clearance = rng.uniform(0.04, 0.08)
        self.grasp_offset = rng.uniform(0.0, 0.012)
        self.carry_height = rng.uniform(0.18, 0.23)
        self.release_height = rng.uniform(0.1, 0.13)
        self.holding = False
        self.released = False
        self.grasp_height = 0.0
        self.resting_height: float | None = None

    def act(self, observation: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return the command to execute, the command to store, and whether a push is harmless now.

        Both commands are float64 ``(7,)``, as the simulator takes them.
        """
        way, gripper, harmless = self._next(observation)
        stored = at_few_speeds(as_command(way, gripper, SPEED, GAIN))
        return stored if self.as_stored else as_command(way, gripper, self.speed, self.gain), stored, harmless

    def _next(self, observation: dict[str, Any]) -> tuple[np.ndarray, float, bool]:
        """Return the displacement (m), the gripper command, and whether a push is harmless."""
        hand, thing = observation["robot0_eef_pos"], observation[self.target]
        if self.resting_height is None:
            self.resting_height = thing[2]
        lifted = thing[2] - self.resting_height
        if self.holding and hand[2] - self.grasp_height > 0.06 and lifted < 0.03:
            self.holding = self.released = False  # it slipped: again from above
        elif not self.holding and lifted > 0.015 and np.linalg.norm(thing - hand) < 0.04:
            self.holding, self.grasp_height = True, hand[2] - lifted  # a policy that drove has grasped it
        if not self.holding:
            return self._reach(hand, thing)
        return self._carry(hand, thing, observation[self.basket])

    def _reach(self, hand: np.ndarray, thing: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Approach the object: stay above it until the hand is over it, then descend."""
        grasp = thing + [0, 0, self.grasp_offset]
        aside = np.linalg.norm((grasp - hand)[:2])
        above = max(self.resting_height, 0.02) + self.clearance
        goal = grasp + [0, 0, above * np.clip((aside - 0.008) / 0.015, 0, 1)]
        if aside < 0.012 and abs(goal[2] - hand[2]) < 0.008:
            self.holding, self.grasp_height = True, hand[2]
            return np.array([0, 0, 0.006]), CLOSE, False
        return goal - hand, OPEN, aside > 0.04

    def _carry(self, hand: np.ndarray, thing: np.ndarray, basket: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Lift, slowly while the fingers close; move over the basket once high enough; lower; open."""
        height = hand[2] - self.grasp_height
        if self.released:
            return np.array([0, 0, 0.01]), OPEN, False
        aside = basket[:2] - hand[:2]
        distance = np.linalg.norm(aside)
        high = self.release_height + (self.carry_height - self.release_height) * np.clip((distance - 0.02) / 0.06, 0, 1)
        up = np.clip(high - height, -0.05, 0.008 + 1.2 * max(height, 0.0))
        if distance < 0.025 and abs(high - height) < 0.015:
            self.released = True
            return np.array([0, 0, 0.01]), OPEN, False
        across = aside * np.clip((height - 0.08) / 0.06, 0, 1)
        return np.array([*across, up]), CLOSE, height > 0.12 and distance > 0.06


def as_command(way: np.ndarray, gripper: float, speed: float, gain: float) -> np.ndarray:
    """Return the command for a displacement (m) at a gain, limited to a speed of the controller: float64 ``(7,)``."""
    step = way * gain
    longest = np.abs(step).max()
    step = step * min(1.0, speed / longest) if longest else step
    # Rounded as it will be stored: what is executed is what a dataset's reader gives.
    return np.array([*step, 0.0, 0.0, 0.0, gripper], np.float32).astype(np.float64)


def at_few_speeds(command: np.ndarray) -> np.ndarray:
    """Return the command with each of its movements rounded to the nearest of ``SPEEDS``: float64 ``(7,)``."""
    step = command[:3]
    few = np.sign(step) * SPEEDS[np.searchsorted(NEXT_SPEED_FROM, np.abs(step), side="right")]
    return np.array([*few, *command[3:]], np.float32).astype(np.float64)


class Pushes:
    """Disturbance of the arm, so that demonstrations show recovery: noise, and occasional pushes of some steps."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.noise = rng.choice([0.0, 0.05, 0.1])
        self.rate = rng.choice([0.0, 0.02, 0.04])
        self.left, self.push = 0, np.zeros(3)

    def executed(self, action: np.ndarray, harmless: bool, observation: dict[str, Any]) -> np.ndarray:
        """Return the command with the disturbance: float64 ``(7,)``."""
        if not harmless:
            self.left = 0
            return action
        if not self.left and self.rng.random() < self.rate:
            self.left = int(self.rng.integers(3, 8))
            direction = self.rng.normal(size=3)
            self.push = direction / np.linalg.norm(direction) * self.rng.uniform(0.5, 1.0)
        movement = action[:3] + self.rng.normal(size=3) * self.noise
        if self.left:
            self.left, movement = self.left - 1, self.push
        return np.array([*np.clip(movement, -1, 1), *action[3:]])


class Undisturbed:
    """No disturbance."""

    def executed(self, action: np.ndarray, harmless: bool, observation: dict[str, Any]) -> np.ndarray:
        """Return the unchanged command."""
        return action


class Driven:
    """Disturbance by a policy, which acts for some steps and makes mistakes."""

    def __init__(self, policy: Policy, instruction: str, cameras: Sequence[str], rng: np.random.Generator) -> None:
        self.actor = ActionQueue(policy) if policy.model.config.chunk_length > 1 else policy
        self.instruction, self.cameras = instruction, cameras
        self.left = int(rng.integers(*DRIVEN_STEPS))

    def executed(self, action: np.ndarray, harmless: bool, observation: dict[str, Any]) -> np.ndarray:
        """Return the policy's action, and after its steps the command: float64 ``(7,)``."""
        if not self.left:
            return action
        self.left -= 1
        frames = [upright(observation[f"{camera}_image"]) for camera in self.cameras]
        answer = self.actor.act(frames if len(frames) > 1 else frames[0], self.instruction)
        return convert_action(answer, "libero")


@dataclasses.dataclass
class Attempt:
    """Recording of an attempt, one entry per step.

    Attributes:
        succeeded: Whether the task was done.
        states: Robot states, float64 ``(8,)``.
        commands: The oracle's at its usual speeds, float64 ``(7,)``.
        images: JPEG files by the simulator's camera, upright.
    """

    succeeded: bool = False
    states: list[np.ndarray] = dataclasses.field(default_factory=list)
    commands: list[np.ndarray] = dataclasses.field(default_factory=list)
    images: dict[str, list[bytes]] = dataclasses.field(default_factory=dict)


def demonstrate(
    environment: Any,
    cameras: Sequence[str],
    initial_state: np.ndarray,
    rng: np.random.Generator,
    max_steps: int,
    disturbed: bool = True,
    driver: tuple[Policy, str] | None = None,
) -> Attempt:
    """Run one attempt at a task.

    Args:
        environment: The simulator with a pick-and-place task.
        cameras: The simulator's names of those that look on.
        initial_state: One of the task's.
        rng: Of everything that differs between attempts.
        max_steps: An attempt that takes longer has failed.
        disturbed: Start elsewhere than evaluation does in most attempts, and push the arm; without, the commands alone
            repeat the attempt.
        driver: A policy, and its instruction, that drives first in place of the pushes.
    """
    environment.reset()
    look(environment, cameras, False)
    observation = environment.set_init_state(initial_state)
    for _ in range(SETTLING_STEPS - 1):
        observation = environment.step(STAY)[0]
    if disturbed and rng.random() < ELSEWHERE:
        start = observation["robot0_eef_pos"] + rng.uniform((-0.08, -0.1, -0.06), (0.12, 0.1, 0.06))
        for _ in range(MOVING_STEPS):
            way = np.clip((start - observation["robot0_eef_pos"]) * 15, -1, 1)
            observation = environment.step(np.array([*way, 0, 0, 0, OPEN]))[0]
    look(environment, cameras, True)
    observation = environment.step(STAY)[0]
    target, basket = environment.obj_of_interest
    oracle = Oracle(target, basket, rng, as_stored=not disturbed)
    if driver:
        disturbance = Driven(*driver, cameras, rng)
    else:
        disturbance = Pushes(rng) if disturbed else Undisturbed()
    attempt = Attempt(images={camera: [] for camera in cameras})
    while len(attempt.commands) < max_steps and not attempt.succeeded:
        command, stored, harmless = oracle.act(observation)
        attempt.states.append(end_effector_state(observation))
        attempt.commands.append(stored)
        for camera in cameras:
            attempt.images[camera].append(as_jpeg(observation[f"{camera}_image"]))
        observation = environment.step(disturbance.executed(command, harmless, observation))[0]
        attempt.succeeded = bool(environment.check_success())
    return attempt


def moved(environment: Any, initial_state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return an initial state, flat as MuJoCo's ``[time, qpos, qvel]``, with every object moved a little."""
    state = initial_state.copy()
    for thing in environment.env.objects_dict.values():
        first, _ = environment.sim.model.get_joint_qpos_addr(thing.joints[-1])
        state[1 + first : 3 + first] += rng.uniform(-MOVED_BY, MOVED_BY, 2)
    return state


def look(environment: Any, cameras: Sequence[str], on: bool) -> None:
    """Switch rendering in every step on or off; it takes most of a step's time."""
    simulation = environment.env
    for camera in cameras:
        simulation.modify_observable(f"{camera}_image", "enabled", on)
        # The clock that says when in a control step it looks was moved so by a reset and an initial state.
        for _ in range(2 * on):
            simulation._observables[f"{camera}_image"].update(
                simulation.model_timestep, simulation._obs_cache, force=True
            )


def upright(frame: np.ndarray) -> np.ndarray:
    """Turn the renderer's frame by 180 degrees, as evaluation and the published data do."""
    return np.ascontiguousarray(frame[::-1, ::-1])


def as_jpeg(frame: np.ndarray) -> bytes:
    """Return the renderer's frame in the orientation in which it is stored."""
    stream = io.BytesIO()
    Image.fromarray(upright(frame)).save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def collect(args: argparse.Namespace) -> int:
    """Collect the missing episodes; return the exit status."""
    cameras = {column: name for column, name in CAMERAS.items() if name in args.cameras}
    suite = open_suite(args.suite)
    tasks = parse_tasks(args.tasks, suite)
    writer = LeRobotWriter(
        args.out,
        fps=CONTROL_HZ,
        numbers={"action": ACTION_NAMES, "observation.state": STATE_NAMES},
        cameras=dict.fromkeys(cameras, (SIZE, SIZE)),
        texts=("language_instruction",),
        robot_type="panda",
    )
    for task_id in tasks:
        _collect_task(args, suite, task_id, writer, cameras)
    writer.write_statistics()
    return 0


def _collect_task(
    args: argparse.Namespace, suite: Any, task_id: int, writer: LeRobotWriter, cameras: dict[str, str]
) -> None:
    """Collect a task's missing episodes."""
    language = suite.get_task(task_id).language
    done = sum(row["tasks"] == [language] for row in writer.episodes)
    if done >= args.episodes:
        return
    record = Path(args.out) / "meta" / "collection.json"
    known = _known(record)
    mine = known.setdefault(str(task_id), {"instruction": language, "attempts": 0, "failures_left_out": 0})
    if args.policy:
        mine.setdefault("first_attempt_that_a_policy_began", mine["attempts"])
    with (
        tqdm(total=args.episodes, initial=done, desc=language, unit="episode", file=sys.stdout) as bar,
        contextlib.closing(_attempts(args, task_id, list(cameras.values()), mine["attempts"])) as attempts,
    ):
        while bar.n < args.episodes:
            attempt = next(attempts)
            if attempt.succeeded:
                images = {column: attempt.images[name] for column, name in cameras.items()}
                numbers = {"action": np.stack(attempt.commands), "observation.state": np.stack(attempt.states)}
                writer.add_episode(language, numbers, images, {"language_instruction": language})
                bar.update()
            mine["attempts"] += 1
            mine["failures_left_out"] += not attempt.succeeded
            _record(record, args, known)
            bar.set_postfix(failed=mine["failures_left_out"], steps=len(attempt.commands))
            if mine["failures_left_out"] > 20 + mine["attempts"] // 2:
                raise ValueError(f"The oracle fails at {language!r} too often ({mine}); leave the task out.")


def _attempts(args: argparse.Namespace, task_id: int, cameras: list[str], first: int) -> Iterator[Attempt]:
    """Yield a task's attempts from number ``first`` on, endlessly and in order, from any number of processes."""
    # A renderer does not survive a fork.
    pool = ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn"))
    ahead: collections.deque[Future[Attempt]] = collections.deque()
    try:
        for number in itertools.count(first):
            ahead.append(pool.submit(_attempt, args, task_id, cameras, number))
            if len(ahead) > args.workers:
                yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=1)
def _scene(suite_name: str, task_id: int, cameras: tuple[str, ...]) -> tuple[Any, np.ndarray, str]:
    """Return this process's simulator with a task, the task's initial states, and its instruction."""
    suite = open_suite(suite_name)
    environment = make_environment(suite, task_id, camera_names=list(cameras), camera_heights=SIZE, camera_widths=SIZE)
    return environment, suite.get_task_init_states(task_id), suite.get_task(task_id).language


@functools.lru_cache(maxsize=1)
def _policy(model: str) -> Policy:
    """Return this process's policy, on one thread: processes share the cores."""
    torch.set_num_threads(1)
    in_tokens = OpenVLAConfig.from_pretrained(model).action_head is None  # a continuous head has nothing to constrain
    return load_policy(model, dtype="float32", constrain_actions=in_tokens)


def _attempt(args: argparse.Namespace, task_id: int, cameras: list[str], number: int) -> Attempt:
    """Run a task's attempt of this number; the result does not depend on the process."""
    environment, initial_states, instruction = _scene(args.suite, task_id, tuple(cameras))
    low, high = args.initial_states
    rng = np.random.default_rng([args.seed, task_id, number])
    passes, index = divmod(number, high - low)
    initial = initial_states[low + index]
    if passes >= MOVED_FROM and not args.undisturbed:
        initial = moved(environment, initial, rng)
    driver = (_policy(args.policy), instruction) if args.policy else None
    return demonstrate(environment, cameras, initial, rng, args.max_steps, not args.undisturbed, driver)


def _known(record: Path) -> dict[str, Any]:
    """Return attempts and failures of every task so far."""
    return read_json(record)["tasks"] if record.is_file() else {}


def _record(record: Path, args: argparse.Namespace, tasks: dict[str, Any]) -> None:
    """Write meaning and origin of the data beside LeRobot's own files."""
    content = {
        "suite": args.suite,
        "seed": args.seed,
        "initial_states": list(args.initial_states),
        "moved": f"from attempt {MOVED_FROM * (args.initial_states[1] - args.initial_states[0])} on, every thing lies "
        f"up to {MOVED_BY} m from where its initial state has it, in x and in y",
        "frames": "turned by 180 degrees: upright, as LIBERO's published demonstrations; JPEG",
        "action": "OSC_POSE as the simulator takes it, in units of 0.05 m and 0.5 rad; gripper -1 open, +1 close. What "
        f"the oracle commands at the speeds {SPEEDS.tolist()}: its own speed, pushes and noise were executed and are "
        "not in it",
        "gripper_for_openvla": "1 open, 0 closed: preset libero_object_no_noops inverts and clips",
        "observation.state": "end effector position (m), axis-angle (rad), finger positions (m)",
        "tasks": tasks,
    }
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, content)


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the script's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="DIR", help="the dataset; an interrupted collection goes on")
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--tasks", nargs="+", default=None, metavar="TASK", help="numbers or names; default all")
    parser.add_argument("--episodes", type=int, default=20, metavar="N", help="successful ones a task")
    parser.add_argument("--initial-states", type=int, nargs=2, default=(0, 25), metavar=("FROM", "TO"))
    parser.add_argument("--cameras", nargs="+", default=list(CAMERAS.values()), choices=list(CAMERAS.values()))
    parser.add_argument("--max-steps", type=int, default=250, help="an attempt that takes longer has failed")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="simulators at a time; data are the same")
    parser.add_argument("--undisturbed", action="store_true", help="no pushes, and starts as in evaluation")
    parser.add_argument("--policy", metavar="DIR", help="a trained policy, which drives first in what is still missing")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(collect(arguments().parse_args()))
