"""Check the model server beside vla-eval's own one, and beside ``openvla evaluate`` in LIBERO.

    bash ci/integration_vla_eval.sh

Both servers run by vla-eval's own commands. Compared are the actions for the frames of an episode (bfloat16, bit for
bit), and the success and length of episodes of both demo policies in the simulator.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio
import numpy as np
from openvla import load_policy
from PIL import Image
from vla_eval.connection import Connection

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_POLICIES = (REPOSITORY / "assets" / "libero", REPOSITORY / "assets" / "libero_oft")
FRAMES = sorted((REPOSITORY / "tests" / "fixtures" / "libero_episode").glob("*.jpg"))
INSTRUCTION = "pick up the alphabet soup and place it in the basket"
EPISODES = 2  # of LIBERO-Object's first task, for each policy
START_SECONDS = 600  # uv may have to build an environment


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def served(command: Sequence[str | Path], folder: Path, port: int) -> Iterator[str]:
    """Run a server until it is healthy, yield its URL, and end it with all its processes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{command} did not start, exit status {process.poll()}") from None
                time.sleep(0.5)
        yield f"ws://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def vla_eval_serve(script: Path, folder: Path, **arguments: str | Path) -> contextlib.AbstractContextManager[str]:
    """Serve by ``vla-eval serve``."""
    port = free_port()
    config = {"script": str(script), "args": {name: str(value) for name, value in arguments.items()}}
    file = folder / "server.yaml"
    file.write_text(json.dumps(config))  # which is YAML
    return served(["vla-eval", "serve", "--config", file, "--address", f"127.0.0.1:{port}"], folder, port)


async def predicted_actions(url: str, frames: Sequence[np.ndarray]) -> np.ndarray:
    """Return the actions of a server for frames of one camera, float32 ``(frames, 7)``."""
    connection = Connection(url, timeout=120)
    await connection.connect()
    await connection.start_episode({"task": {"name": INSTRUCTION}})
    observations = [{"images": {"agentview": frame}, "task_description": INSTRUCTION} for frame in frames]
    actions = [(await connection.act(observation))["actions"] for observation in observations]
    await connection.end_episode({})
    await connection.close()
    return np.stack(actions)


def check_actions(script: Path, their_python: Path, folder: Path) -> None:
    """Compare the actions of the token policy with those of vla-eval's own server."""
    # At the model's size that server's resize changes nothing; else it approximates the reference's preprocessing.
    frames = [np.asarray(Image.open(frame).resize((224, 224))) for frame in FRAMES]
    policy = load_policy(DEMO_POLICIES[0])
    model = folder / "model"
    policy.model.save_pretrained(model)  # with its code, which their server runs
    policy.processor.save_pretrained(model)
    arguments = {"model_path": model, "dtype": "bfloat16", "constrain_actions": "true"}
    with vla_eval_serve(script, folder, **arguments) as url:
        ours = anyio.run(predicted_actions, url, frames)
    port = free_port()
    command = [their_python, "-m", "vla_eval.model_servers.openvla", f"--args.model_path={model}", f"--port={port}"]
    with served(command, folder, port) as url:
        theirs = anyio.run(predicted_actions, url, frames)
    np.testing.assert_array_equal(ours, theirs)
    assert len(np.unique(ours, axis=0)) > len(frames) // 2  # the actions depend on the frames
    print(f"vla-eval's own server on transformers 4.40.1: {len(frames)} equal actions", flush=True)


def check_episodes(script: Path, model: Path, folder: Path) -> None:
    """Compare the episodes of ``vla-eval run`` with those of ``openvla evaluate``."""
    benchmark = {
        "benchmark": "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark",
        "episodes_per_task": EPISODES,
        "max_tasks": 1,
        "params": {"suite": "libero_object", "seed": 0},
    }
    predicts_tokens = model == DEMO_POLICIES[0]
    constrained = {"constrain_actions": "true"} if predicts_tokens else {}
    with vla_eval_serve(script, folder, model_path=model, **constrained) as url:
        config = folder / "run.yaml"
        config.write_text(
            json.dumps({"server": {"url": url}, "output_dir": str(folder / "theirs"), "benchmarks": [benchmark]})
        )
        subprocess.run(["vla-eval", "run", "--config", config, "--no-docker", "--render", "gpu"], check=True)
    (result,) = (folder / "theirs").glob("*_aggregate.json")
    (task,) = json.loads(result.read_text())["tasks"]
    theirs = [(bool(episode["metrics"]["success"]), episode["steps"]) for episode in task["episodes"]]
    command = [sys.executable, "-m", "openvla", "evaluate", "--model", model, "--tasks", "0", "--episodes", EPISODES]
    command += ["--output", folder / "ours", "--json", *(["--constrain-actions"] if predicts_tokens else [])]
    report = json.loads(subprocess.run(map(str, command), check=True, stdout=subprocess.PIPE).stdout)
    ours = [(run["success"], run["steps"]) for run in report["results"][0]["runs"]]
    assert ours == theirs, f"{model.name}: openvla evaluate {ours}, vla-eval run {theirs}"
    print(f"{model.name}: (success, steps) of both are {ours}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="the model server, with a header that uv can resolve")
    parser.add_argument("their_python", type=Path, help="an environment with vla-eval and transformers 4.40.1")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        check_actions(options.script, options.their_python, Path(name))
    for demo_policy in DEMO_POLICIES:
        with tempfile.TemporaryDirectory() as name:
            check_episodes(options.script, demo_policy, Path(name))
