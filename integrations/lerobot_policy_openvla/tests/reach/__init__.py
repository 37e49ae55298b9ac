"""A small task as LeRobot sees one: a gym environment, a robot, and demonstrations in LeRobot's format.

An arm's tip moves on a board of 32 x 32 pixels and must reach a square. The first two of seven action numbers move it.
"""

from dataclasses import dataclass, field

import gymnasium
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig
from lerobot.robots import Robot, RobotConfig

SIZE, SPEED, NEAR = 32, 4.0, 3.0
TASK = "reach the square"
ACTION_NAMES = [f"joint_{i}.pos" for i in range(7)]
STATE_NAMES = [f"joint_{i}.pos" for i in range(8)]


class Board:
    """The board: position of tip and square, and what the cameras see."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.tip, self.square = self.rng.uniform(4, SIZE - 4, (2, 2))

    def move(self, action):
        self.tip = np.clip(self.tip + SPEED * np.clip(action[:2], -1, 1), 0, SIZE - 1)

    @property
    def distance(self):
        return float(np.linalg.norm(self.tip - self.square))

    @property
    def state(self):
        return np.concatenate([self.tip, self.square, np.zeros(4)]).astype(np.float32) / SIZE

    def image(self, wrist=False):
        rows, columns = np.mgrid[:SIZE, :SIZE]
        offset = self.tip - SIZE / 2 if wrist else np.zeros(2)
        picture = np.full((SIZE, SIZE, 3), 40, np.uint8)
        for centre, channel in ((self.square, 0), (self.tip, 1)):
            y, x = centre - offset
            picture[(abs(rows - y) < 3) & (abs(columns - x) < 3), channel] = 220
        return picture

    def expert_action(self):
        action = np.zeros(7, np.float32)
        action[:2] = np.clip((self.square - self.tip) / SPEED, -1, 1)
        return action + self.rng.uniform(-0.05, 0.05, 7).astype(np.float32)


class ReachEnv(gymnasium.Env):
    """The board as a gym environment with LeRobot's names of observations."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    task_description = TASK
    task = TASK

    def __init__(self, episode_length=6, render_mode="rgb_array"):
        self._max_episode_steps, self.render_mode = episode_length, render_mode
        image = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "pixels": gymnasium.spaces.Dict({"front": image, "wrist": image}),
                "agent_pos": gymnasium.spaces.Box(-1, 2, (8,), np.float32),
            }
        )
        self.action_space = gymnasium.spaces.Box(-1, 1, (7,), np.float32)

    def _observation(self):
        pixels = {"front": self.board.image(), "wrist": self.board.image(wrist=True)}
        return {"pixels": pixels, "agent_pos": self.board.state}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.board, self.steps = Board(seed), 0
        return self._observation(), {"is_success": False}

    def step(self, action):
        self.board.move(action)
        self.steps += 1
        reached = self.board.distance < NEAR
        observation, reward = self._observation(), -self.board.distance
        return observation, reward, reached, self.steps >= self._max_episode_steps, {"is_success": reached}

    def render(self):
        return self.board.image()


def image_feature():
    return PolicyFeature(type=FeatureType.VISUAL, shape=(SIZE, SIZE, 3))


@EnvConfig.register_subclass("reach")
@dataclass
class ReachEnvConfig(EnvConfig):
    task: str | None = "Reach-v0"
    fps: int = 10
    episode_length: int = 6
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(type=FeatureType.ACTION, shape=(7,)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(8,)),
            "observation.images.front": image_feature(),
            "observation.images.wrist": image_feature(),
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            "observation.images.front": "observation.images.front",
            "observation.images.wrist": "observation.images.wrist",
        }
    )

    @property
    def gym_kwargs(self):
        return {"episode_length": self.episode_length}


gymnasium.register("gym_reach/Reach-v0", ReachEnv)


@RobotConfig.register_subclass("reach_arm")
@dataclass
class ReachArmConfig(RobotConfig):
    """The arm as a robot of LeRobot; ``sent`` keeps what it saw and was told."""


class ReachArm(Robot):
    config_class, name = ReachArmConfig, "reach_arm"
    sent = []  # of the last connection: (image, action)

    def __init__(self, config):
        super().__init__(config)
        self.connected = False

    @property
    def observation_features(self):
        return {**dict.fromkeys(STATE_NAMES, float), "front": (SIZE, SIZE, 3), "wrist": (SIZE, SIZE, 3)}

    @property
    def action_features(self):
        return dict.fromkeys(ACTION_NAMES, float)

    @property
    def is_connected(self):
        return self.connected

    is_calibrated = True

    def connect(self, calibrate=True):
        self.board, self.connected = Board(0), True
        self.sent.clear()

    def calibrate(self):
        pass

    def configure(self):
        pass

    def get_observation(self):
        state = dict(zip(STATE_NAMES, map(float, self.board.state), strict=True))
        return {**state, "front": self.board.image(), "wrist": self.board.image(wrist=True)}

    def send_action(self, action):
        numbers = np.array([action[name] for name in ACTION_NAMES])
        self.sent.append((self.board.image(), self.board.image(wrist=True), self.board.state, numbers))
        self.board.move(numbers)
        return action

    def disconnect(self):
        self.connected = False


def write_dataset(root, repo_id, *, episodes=6, length=10):
    """Write demonstrations with LeRobot's own library."""
    from lerobot.datasets import LeRobotDataset

    image = {"dtype": "image", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
    features = {
        "observation.images.front": image,
        "observation.images.wrist": image,
        "observation.state": {"dtype": "float32", "shape": (8,), "names": STATE_NAMES},
        "action": {"dtype": "float32", "shape": (7,), "names": ACTION_NAMES},
    }
    dataset = LeRobotDataset.create(repo_id, fps=10, features=features, root=root, use_videos=False)
    for episode in range(episodes):
        board = Board(episode)
        for _ in range(length):
            action = board.expert_action()
            frame = {"observation.images.front": board.image(), "observation.images.wrist": board.image(wrist=True)}
            dataset.add_frame({**frame, "observation.state": board.state, "action": action, "task": TASK})
            board.move(action)
        dataset.save_episode()
    dataset.finalize()
    return root
