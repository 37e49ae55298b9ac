"""Train a policy of LeRobot on our LIBERO demonstrations and put it behind openpi's protocol, to compare it with ours.

    python benchmarks/lerobot_libero.py shrink demos/libero_object_no_noops milk --task milk
    lerobot-train --policy.type=act --dataset.repo_id=local/milk --dataset.root=milk ...
    python benchmarks/lerobot_libero.py serve act/checkpoints/last/pretrained_model --port 8765
    openvla evaluate --server ws://127.0.0.1:8765 --server-image-size 256 --tasks milk --first-initial-state 25

The whole commands and the results are in benchmarks/results/libero.md. Training and serving need lerobot beside openvla
(the environment of ci/integration_lerobot.sh), serving also msgpack and websockets.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 112  # pixels: ten times less work than 256 for a network that convolves whole frames
STATE, IMAGE, ACTION = "observation.state", "observation.image", "action"


def shrunk(frame: np.ndarray) -> Image.Image:
    """Return a frame, uint8 ``(height, width, 3)``, at the size that the policy is trained on."""
    return Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BOX)


def shrink(source: Path, destination: Path, task: str) -> None:
    """Write the demonstrations of a task, with small frames, as LeRobot v3."""
    from openvla.data.lerobot_writer import LeRobotWriter
    from openvla.data.open import open_dataset

    reader = open_dataset(source, preset="none", fields={"cameras": [IMAGE], "proprio": [STATE], "action": [ACTION]})
    features = reader.info["features"]
    numbers = {name: features[name]["names"] for name in (ACTION, STATE)}
    writer = LeRobotWriter(destination, fps=reader.info["fps"], numbers=numbers, cameras={IMAGE: (SIZE, SIZE)})
    for index in range(len(reader)):
        episode = reader[index]
        steps = [episode.step(number, 1, 1) for number in range(len(episode))]
        if task not in steps[0].instruction:
            continue
        images = []
        for step in steps:
            buffer = io.BytesIO()
            shrunk(step.images[0]).save(buffer, "PNG")
            images.append(buffer.getvalue())
        values = {ACTION: np.stack([step.actions[0] for step in steps]), STATE: np.stack([s.proprio for s in steps])}
        writer.add_episode(steps[0].instruction, values, {IMAGE: images})
    writer.write_statistics()
    print(f"{len(writer)} episodes in {destination}")


def serve(checkpoint: Path, port: int) -> None:
    """Answer openpi's observations with the policy's chunks of actions."""
    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors
    from openvla.inference.openpi_messages import pack_msgpack, unpack_msgpack
    from websockets.sync.server import serve as serve_websocket

    config = PreTrainedConfig.from_pretrained(checkpoint)
    policy = get_policy_class(config.type).from_pretrained(checkpoint).eval()
    before, after = make_pre_post_processors(config, pretrained_path=str(checkpoint))

    @torch.inference_mode()
    def act(observation: dict[str, Any]) -> np.ndarray:
        frame = np.asarray(shrunk(observation["observation/image"]))
        batch = {
            IMAGE: torch.from_numpy(frame.copy()).permute(2, 0, 1).float()[None] / 255,
            STATE: torch.from_numpy(np.array(observation["observation/state"], np.float32))[None],
            "task": [observation["prompt"]],
        }
        return after(policy.predict_action_chunk(before(batch)))[0].numpy()

    def answer(connection: Any) -> None:
        connection.send(pack_msgpack({"policy": config.type}))
        for message in connection:
            connection.send(pack_msgpack({"actions": act(unpack_msgpack(message))}))

    with serve_websocket(answer, "127.0.0.1", port, compression=None, max_size=None) as server:
        print(f"ws://127.0.0.1:{port}", flush=True)
        server.serve_forever()


def main() -> None:
    """Shrink demonstrations, or serve a policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    shrinking = parts.add_parser("shrink", help="write the demonstrations of a task with small frames")
    shrinking.add_argument("source", type=Path)
    shrinking.add_argument("destination", type=Path)
    shrinking.add_argument("--task", required=True, help="part of its instruction")
    serving = parts.add_parser("serve", help="answer openpi's observations")
    serving.add_argument("checkpoint", type=Path)
    serving.add_argument("--port", type=int, default=8765)
    args = parser.parse_args()
    if args.part == "shrink":
        shrink(args.source, args.destination, args.task)
    else:
        serve(args.checkpoint, args.port)


if __name__ == "__main__":
    main()
