"""Tiny models in the openvla package's format, demonstrations in LeRobot's, and batches of both."""

import os

import numpy as np
import pytest
import reach
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies import make_policy, make_pre_post_processors
from lerobot.policies.factory import make_policy_config
from lerobot.utils.import_utils import register_third_party_plugins
from openvla.tiny import build_tiny

os.environ["HF_HUB_OFFLINE"] = "1"
REPO_ID = "tests/reach"
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
STATISTICS = {"q01": [-1.0, -0.5, -0.25, -1, -1, -1, 0], "q99": [0.5, 1.0, 0.75, 1, 1, 1, 1]}
OFT = {
    "parallel_decoding": True,
    "action_head": "l1",
    "chunk_length": 4,
    "action_dim": 7,
    "proprio_dim": 8,
    "num_images_in_input": 2,
    "norm_stats": {
        "robot": {
            "action": {**STATISTICS, "mask": [True] * 6 + [False]},
            "proprio": {"q01": [-0.1] * 8, "q99": [1.1] * 8},
        }
    },
}
ACTION_CONFIG = {name: value for name, value in OFT.items() if name not in ("norm_stats", "parallel_decoding")}
ENVIRONMENT = ["--env.type=reach", "--env.discover_packages_path=reach", "--eval.use_async_envs=false"]


@pytest.fixture(scope="session", autouse=True)
def plugins():
    """Let LeRobot import the installed plugins, as its commands do."""
    register_third_party_plugins()
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def write_model(tmp_path_factory):
    def write(**overrides):
        folder = tmp_path_factory.mktemp("model")
        for part in build_tiny(**overrides):
            part.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def tokens_folder(write_model):
    """An OpenVLA: one camera, one action in tokens."""
    return write_model()


@pytest.fixture(scope="session")
def oft_folder(write_model):
    """An OpenVLA-OFT: two cameras and a state, chunks of four actions."""
    return write_model(**OFT)


@pytest.fixture(scope="session")
def dataset_root(tmp_path_factory):
    return reach.write_dataset(tmp_path_factory.mktemp("data") / "reach", REPO_ID)


@pytest.fixture(scope="session")
def dataset_meta(dataset_root):
    from lerobot.datasets import LeRobotDatasetMetadata

    return LeRobotDatasetMetadata(REPO_ID, root=dataset_root)


@pytest.fixture
def make_config():
    def make(folder, **fields):
        return make_policy_config(
            "openvla", pretrained_openvla=str(folder), device="cpu", **{"push_to_hub": False, **fields}
        )

    return make


@pytest.fixture
def acting(make_config):
    """Return a policy that acts in the environment, as lerobot-eval makes it, and its two processors."""

    def make(folder, **fields):
        config = make_config(folder, **fields)
        policy = make_policy(config, env_cfg=reach.ReachEnvConfig()).eval()
        return policy, *make_pre_post_processors(config)

    return make


@pytest.fixture
def trainee(make_config, dataset_meta):
    """Return a policy that trains on the demonstrations, as lerobot-train makes it."""

    def make(folder, **fields):
        torch.manual_seed(0)
        return make_policy(make_config(folder, **fields), ds_meta=dataset_meta).train()

    return make


@pytest.fixture
def training_batch(dataset_root):
    """Return a batch of LeRobot's dataset after its preprocessor, as lerobot-train gives it to a policy."""
    from lerobot.datasets import LeRobotDataset

    def load(policy, indices):
        deltas = {"action": [step / 10 for step in policy.config.action_delta_indices]}
        dataset = LeRobotDataset(REPO_ID, root=dataset_root, delta_timestamps=deltas)
        batch = torch.utils.data.default_collate([dataset[index] for index in indices])
        preprocess, _ = make_pre_post_processors(policy.config, dataset_stats=dataset.meta.stats)
        return preprocess(batch)

    return load


def frames(seed, rows):
    """Return random images ``(height, width, 3)`` of both cameras and states of several environments."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (2, rows, reach.SIZE, reach.SIZE, 3), dtype=np.uint8)
    return images[0], images[1], rng.uniform(0, 1, (rows, 8)).astype(np.float32)


def observation(front, wrist, state, task=reach.TASK):
    """Return an observation as LeRobot makes it of an environment's: images channels first, float32 in [0, 1]."""
    as_tensor = {name: torch.from_numpy(x).permute(0, 3, 1, 2) / 255 for name, x in ((FRONT, front), (WRIST, wrist))}
    return {**as_tensor, "observation.state": torch.from_numpy(state), "task": [task] * len(front)}


def features(*cameras, state=8, action=7):
    """Return the fields of a configuration with these features."""
    inputs = {name: PolicyFeature(type=FeatureType.VISUAL, shape=(3, 32, 32)) for name in cameras}
    if state:
        inputs["observation.state"] = PolicyFeature(type=FeatureType.STATE, shape=(state,))
    outputs = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(action,))}
    return {"input_features": inputs, "output_features": outputs}
