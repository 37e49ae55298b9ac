"""Improve a policy that predicts tokens by GRPO in the LIBERO simulator, from success alone.

    python examples/grpo_libero.py runs/grpo --tasks milk --minutes 20
    openvla evaluate --model runs/grpo --tasks milk --first-initial-state 25 --episodes 25 --constrain-actions

Every iteration runs groups of episodes, each from one initial state, with drawn actions. An episode's advantage is its
success minus its group's mean, over the standard deviation; groups with one outcome teach nothing (GRPO, arXiv
2402.03300, without the KL term). Then one pass of updates over the steps, with the clipped ratio of probabilities.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from collect_libero import SETTLING_STEPS, STAY, look, upright
from openvla import load_policy, observation_batch
from openvla.configuration_openvla import write_json
from openvla.evaluation.simulator import make_environment, open_suite, parse_tasks
from openvla.inference.policy import DEMO_POLICY, Policy
from openvla.inference.robot_conventions import convert_action
from safetensors.torch import load_file

CAMERA, SIZE = "agentview", 256  # pixels; as in evaluation
CLIP = 0.2  # of the ratio of probabilities
MAX_GRADIENT_NORM = 1.0


class Environment(Protocol):
    """An environment of episodes; ``LiberoEnvironment`` is the simulator's."""

    def reset(self, initial_state: int) -> np.ndarray:
        """Begin an episode; return the frame, uint8 ``(height, width, 3)``."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Execute OpenVLA's action, float64 ``(7,)``; return the next frame and whether the task is done."""


@dataclass
class Episode:
    """An episode with drawn actions, one entry per step.

    Attributes:
        instruction: Instruction of the task.
        success: Whether the task was done.
        frames: What the policy saw, uint8 ``(height, width, 3)``.
        tokens: Drawn tokens, int64 ``(7,)``.
        log_probs: Their log-probabilities, float32 ``(7,)``.
        advantage: Success compared with the group's.
    """

    instruction: str
    success: bool = False
    frames: list[np.ndarray] = field(default_factory=list)
    tokens: list[torch.Tensor] = field(default_factory=list)
    log_probs: list[torch.Tensor] = field(default_factory=list)
    advantage: float = 0.0


class LiberoEnvironment:
    """A task of LIBERO from its stored initial states."""

    def __init__(self, suite: Any, task: int) -> None:
        self.simulator = make_environment(suite, task, camera_names=[CAMERA], camera_heights=SIZE, camera_widths=SIZE)
        self.initial_states = suite.get_task_init_states(task)

    def reset(self, initial_state: int) -> np.ndarray:
        """Begin an episode; objects fall into place first, as in evaluation."""
        self.simulator.reset()
        look(self.simulator, [CAMERA], False)
        self.simulator.set_init_state(self.initial_states[initial_state])
        for _ in range(SETTLING_STEPS - 1):
            self.simulator.step(STAY)
        look(self.simulator, [CAMERA], True)
        return upright(self.simulator.step(STAY)[0][f"{CAMERA}_image"])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Execute an action; a drawn gripper may be any bin, so it is clipped first."""
        action = np.array([*action[:-1], np.clip(action[-1], 0, 1)])
        observation = self.simulator.step(convert_action(action, "libero"))[0]
        return upright(observation[f"{CAMERA}_image"]), bool(self.simulator.check_success())


def run_episode(
    environment: Environment,
    policy: Policy,
    instruction: str,
    initial_state: int,
    max_steps: int,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Episode:
    """Run one episode with drawn actions."""
    episode = Episode(instruction)
    frame = environment.reset(initial_state)
    while len(episode.frames) < max_steps and not episode.success:
        inputs = observation_batch(policy.processor, [frame], [instruction])
        actions, tokens, log_probs = policy.model.sample_actions(
            **inputs, unnorm_key=policy.unnorm_key, temperature=temperature, generator=generator
        )
        episode.frames.append(frame)
        episode.tokens.append(tokens[0])
        episode.log_probs.append(log_probs[0])
        frame, episode.success = environment.step(actions[0])
    return episode


def set_advantages(group: Sequence[Episode]) -> None:
    """Set the advantages of episodes that began in one state: 0 if all had the same outcome."""
    successes = np.array([episode.success for episode in group], dtype=np.float64)
    deviation = successes.std() or 1.0
    for episode, advantage in zip(group, (successes - successes.mean()) / deviation):
        episode.advantage = float(advantage)


def grpo_update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    episodes: Sequence[Episode],
    *,
    temperature: float,
    steps_per_episode: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Update the policy once on the steps of all episodes with an advantage.

    Args:
        policy: Policy in eval mode.
        optimizer: Optimizer of its trainable parameters.
        episodes: Episodes with advantages.
        temperature: Of the draws.
        steps_per_episode: Number of steps to draw from each episode; None for all.
        batch_size: Steps of an update.
        seed: Seed of the order.

    Returns:
        For every update its ``loss``, ``ratio`` (mean of the probabilities over those of the rollout) and
        ``gradient_norm``.
    """
    order = random.Random(seed)
    samples = []
    for episode in (episode for episode in episodes if episode.advantage):
        steps = range(len(episode.frames))
        count = min(len(steps), steps_per_episode or len(steps))
        samples += [(episode, step) for step in order.sample(steps, count)]
    order.shuffle(samples)
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    rows = []
    for first in range(0, len(samples), batch_size):
        batch = samples[first : first + batch_size]
        inputs = observation_batch(
            policy.processor, [e.frames[step] for e, step in batch], [e.instruction for e, _ in batch]
        )
        tokens = torch.stack([e.tokens[step] for e, step in batch])
        log_probs, _ = policy.model.action_log_probs(**inputs, tokens=tokens, temperature=temperature)
        ratio = (log_probs - torch.stack([e.log_probs[step] for e, step in batch])).exp()
        advantage = torch.tensor([e.advantage for e, _ in batch])[:, None]
        loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()
        rows.append({"loss": loss.item(), "ratio": ratio.mean().item(), "gradient_norm": float(norm)})
    return rows


@functools.lru_cache(maxsize=1)
def _worker_policy(model: str) -> Policy:
    """Return this process's policy, on one thread: processes share the cores."""
    torch.set_num_threads(1)
    return load_policy(model, dtype="float32", constrain_actions=True)


@functools.lru_cache(maxsize=1)
def _worker_environment(suite: str, task: int) -> tuple[LiberoEnvironment, str]:
    """Return this process's simulator with a task, and the instruction."""
    opened = open_suite(suite)
    return LiberoEnvironment(opened, task), opened.get_task(task).language


def _worker_episode(args: argparse.Namespace, task: int, initial_state: int, number: int) -> Episode:
    """Run episode ``number`` with the newest weights; its draws depend on the number alone."""
    policy = _worker_policy(str(args.model))
    weights = args.out / "model.safetensors"
    if weights.is_file():
        policy.model.load_state_dict(load_file(weights), strict=False)
    environment, instruction = _worker_environment(args.suite, task)
    generator = torch.Generator().manual_seed(args.seed * 1_000_000 + number)
    return run_episode(environment, policy, instruction, initial_state, args.max_steps, args.temperature, generator)


def collect_groups(
    args: argparse.Namespace, pool: ProcessPoolExecutor, tasks: Sequence[int], iteration: int
) -> Iterator[list[Episode]]:
    """Yield the groups of an iteration, with their advantages."""
    rng = np.random.default_rng([args.seed, iteration])
    starts = [(int(rng.choice(tasks)), int(rng.integers(*args.initial_states))) for _ in range(args.groups)]
    first = iteration * args.groups * args.group_size
    runs = [
        [
            pool.submit(_worker_episode, args, task, state, first + group * args.group_size + member)
            for member in range(args.group_size)
        ]
        for group, (task, state) in enumerate(starts)
    ]
    for futures in runs:
        group = [future.result() for future in futures]
        set_advantages(group)
        successes, steps = sum(e.success for e in group), sum(len(e.frames) for e in group)
        print(f"group of {len(group)}: {successes} successes, {steps} steps", flush=True)
        yield group


def train(args: argparse.Namespace) -> int:
    """Train until the time is up; return the exit status."""
    policy = load_policy(args.model, dtype="float32", constrain_actions=True)
    policy.model.vision_backbone.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad], lr=args.learning_rate)
    tasks = parse_tasks(args.tasks, open_suite(args.suite))
    end = time.monotonic() + 60 * args.minutes
    history: list[dict[str, Any]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "model.safetensors").is_file():
        raise SystemExit(f"{args.out} holds a model already; give another folder.")
    # A renderer does not survive a fork.
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        while time.monotonic() < end:
            groups = list(collect_groups(args, pool, tasks, len(history)))
            episodes = [episode for group in groups for episode in group]
            updates = grpo_update(
                policy,
                optimizer,
                episodes,
                temperature=args.temperature,
                steps_per_episode=args.steps_per_episode,
                seed=len(history),
            )
            policy.model.save_pretrained(args.out)
            history.append(
                {
                    "episodes": len(episodes),
                    "successes": sum(episode.success for episode in episodes),
                    "mixed_groups": sum(any(episode.advantage for episode in group) for group in groups),
                    "updates": len(updates),
                    "first_ratio": updates[0]["ratio"] if updates else None,
                    "minutes_left": round((end - time.monotonic()) / 60, 1),
                }
            )
            print(history[-1], flush=True)
            write_json(args.out / "grpo.json", history)
    policy.processor.save_pretrained(args.out)
    return 0


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the script's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="DIR", help="the improved policy and grpo.json")
    parser.add_argument("--model", type=Path, default=DEMO_POLICY, help="a policy that predicts one action in tokens")
    parser.add_argument("--suite", default="libero_object")
    parser.add_argument("--tasks", nargs="+", default=["milk"], metavar="TASK", help="numbers or names")
    parser.add_argument("--initial-states", type=int, nargs=2, default=(0, 25), metavar=("FROM", "TO"))
    parser.add_argument("--groups", type=int, default=2, help="groups an iteration")
    parser.add_argument("--group-size", type=int, default=4, help="episodes from one initial state")
    parser.add_argument("--max-steps", type=int, default=250, help="an episode that takes longer has failed")
    parser.add_argument("--steps-per-episode", type=int, default=64, help="of them so many, drawn, are trained on")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--minutes", type=float, default=20, help="no iteration begins later")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="simulators at a time")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(train(arguments().parse_args()))
