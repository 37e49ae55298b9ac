"""Serve a policy to a fleet of robots on Ray Serve, and measure it; kill a replica meanwhile.

    pip install openvla 'ray[serve]'
    python examples/ray_serve.py --model DIR_OR_ID --replicas 2 --robots 8 --requests 200 --kill

Replicas predict in batches (``Policy.act_batch``) and keep nothing between requests: any of them may take any request.
So the state of an episode belongs to the robot: it executes chunks through its own ``openvla.ActionQueue``, and sends
the images of all moments to a model with a history. Ray runs on this machine and listens on loopback.
"""

from __future__ import annotations

import argparse
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
from openvla import load_policy
from openvla.inference.predict import SAMPLE_IMAGE
from PIL import Image
from ray import serve

INSTRUCTIONS = (
    "pick up the alphabet soup and place it in the basket",
    "pick up the milk and place it in the basket",
)
REQUEST_TIMEOUT_S = 120


@serve.deployment
class PolicyReplica:
    """A replica: a policy of its own, which predicts for all requests that wait."""

    def __init__(self, model: str | None) -> None:
        self.policy = load_policy(model)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.005)
    async def __call__(self, observations: list[dict[str, Any]]) -> list[Any]:
        """Return the action of each observation; an error fails its own request alone."""
        return self.policy.act_batch(observations, batch_size=8, return_errors=True)


def observation(index: int) -> dict[str, Any]:
    """Return a made-up observation: the sample frame, shifted."""
    frame = np.asarray(Image.open(SAMPLE_IMAGE).convert("RGB"))
    return {"image": np.roll(frame, index % 16, axis=1), "instruction": INSTRUCTIONS[index % 2]}


def kill_a_replica() -> None:
    """Kill one of the replicas, as the loss of its machine would."""
    name = next(actor for actor in ray.util.list_named_actors(all_namespaces=True) if "PolicyReplica" in actor["name"])
    ray.kill(ray.get_actor(name["name"], namespace=name["namespace"]), no_restart=True)


def drive(handle: Any, robots: int, requests: int, kill: bool) -> tuple[dict[int, np.ndarray], dict[int, Exception]]:
    """Send requests of several robots, each of which waits for its action; return actions and errors by request."""
    actions: dict[int, np.ndarray] = {}
    errors: dict[int, Exception] = {}
    killer = threading.Timer(0.0, kill_a_replica)

    def request(index: int) -> None:
        if kill and index == requests // 2:
            killer.start()
        try:
            actions[index] = handle.remote(observation(index)).result(timeout_s=REQUEST_TIMEOUT_S)
        except Exception as error:  # of the replica that died
            errors[index] = error

    with ThreadPoolExecutor(robots) as threads:
        list(threads.map(request, range(requests)))
    if kill:
        killer.join()
    return actions, errors


def main() -> None:
    """Start Ray and the replicas, drive them, and compare every action with that of ``Policy.act``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint; without it the demo policy")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--robots", type=int, default=8, help="requests at a time")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--kill", action="store_true", help="kill a replica in the middle")
    parser.add_argument("--num-gpus", type=float, default=0, help="GPUs of a replica")
    args = parser.parse_args()

    policy, started = load_policy(args.model), time.perf_counter()
    expected = {i: policy.act(**observation(i)) for i in range(32)}  # the observations repeat after 32
    alone = 32 / (time.perf_counter() - started)
    ray.init(num_cpus=args.replicas + 1, include_dashboard=False, log_to_driver=False)
    options = {"num_replicas": args.replicas, "ray_actor_options": {"num_cpus": 1, "num_gpus": args.num_gpus}}
    handle = serve.run(PolicyReplica.options(**options).bind(args.model))
    try:
        drive(handle, args.robots, 4 * args.robots, kill=False)  # both replicas have loaded
        started = time.perf_counter()
        actions, errors = drive(handle, args.robots, args.requests, args.kill)
        seconds = time.perf_counter() - started
    finally:
        serve.shutdown()
        ray.shutdown()
    wrong = [index for index, action in actions.items() if not np.array_equal(action, expected[index % 32])]
    print(f"one process, one request at a time: {alone:.1f} actions/s")
    print(f"{args.replicas} replicas, {args.robots} robots: {len(actions) / seconds:.1f} actions/s")
    print(f"{len(actions)} of {args.requests} requests answered, {len(wrong)} unlike Policy.act, {len(errors)} lost")
    for index, error in errors.items():
        print(f"  request {index}: {type(error).__name__}")
    if wrong or (errors and not args.kill) or len(errors) > args.robots:
        raise SystemExit("A request was answered wrongly, or lost without a reason.")


if __name__ == "__main__":
    main()
