"""Continuous action heads of OpenVLA-OFT, their input projectors, and the noise schedule of the diffusion head.

Parameter names are those of the published part files (``action_head--*.pt`` and the others).
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

import torch
from torch import nn

from .errors_openvla import OpenVLAValueError

# Modules that parallel decoding adds to OpenVLA: heads at the top level, and FiLM layers in the towers' blocks.
HEAD_MODULES = ("action_head", "proprio_projector", "noisy_action_projector")
FILM_LAYER = re.compile(r"vision_backbone\.(fused_)?featurizer\.blocks\.\d+\.(scale|shift)")
NUM_RESNET_BLOCKS = 2
MAX_BETA = 0.999  # cap of "squaredcos_cap_v2" (Nichol and Dhariwal 2021), as in diffusers' betas_for_alpha_bar


class MLPResNetBlock(nn.Module):
    """Residual block: norm, linear, ReLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn(x) + x


class MLPResNet(nn.Module):
    """Residual MLP from the hidden states of one action's tokens to its numbers."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_dim)
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.relu = nn.ReLU()
        self.mlp_resnet_blocks = nn.ModuleList(MLPResNetBlock(hidden_dim) for _ in range(NUM_RESNET_BLOCKS))
        self.layer_norm2 = nn.LayerNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, output_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1RegressionActionHead(nn.Module):
    """Head that regresses normalised actions from hidden states; trained on the mean absolute error."""

    def __init__(self, llm_dim: int, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = MLPResNet(llm_dim * action_dim, llm_dim, action_dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return actions ``(batch, chunk, action_dim)`` for hidden states ``(batch, chunk * action_dim, llm_dim)``."""
        return self.model(_by_action(hidden, self.action_dim))


class NoisePredictor(nn.Module):
    """Container that gives the network its published parameter names."""

    def __init__(self, llm_dim: int, action_dim: int) -> None:
        super().__init__()
        self.mlp_resnet = MLPResNet(llm_dim * action_dim, llm_dim, action_dim)


class DiffusionActionHead(nn.Module):
    """Head that predicts the noise in a noisy chunk; trained on the mean squared error of the noise."""

    def __init__(self, llm_dim: int, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.noise_predictor = NoisePredictor(llm_dim, action_dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return noise ``(batch, chunk, action_dim)`` for hidden states ``(batch, chunk * action_dim, llm_dim)``."""
        return self.noise_predictor.mlp_resnet(_by_action(hidden, self.action_dim))


class FeatureProjector(nn.Module):
    """Two linear layers from proprio, or one noisy number, to the language model's embedding space."""

    def __init__(self, input_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_dim, llm_dim)
        self.act_fn1 = nn.GELU()
        self.fc2 = nn.Linear(llm_dim, llm_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return embeddings ``(..., llm_dim)`` of features ``(..., input_dim)``."""
        return self.fc2(self.act_fn1(self.fc1(features)))


def is_action_head_param(name: str) -> bool:
    """Return whether a module or tensor belongs to a head or to FiLM; these are always trained in full."""
    return name.partition(".")[0] in HEAD_MODULES or FILM_LAYER.match(name) is not None


def _by_action(hidden: torch.Tensor, action_dim: int) -> torch.Tensor:
    """Concatenate the hidden states of each action's tokens: ``(batch, chunk, action_dim * llm_dim)``."""
    return hidden.reshape(len(hidden), hidden.shape[1] // action_dim, -1)


def timestep_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Embed noise levels ``(batch,)`` in sines and cosines (Vaswani et al. 2017): float32 ``(batch, dim)``."""
    exponent = torch.arange(dim // 2, device=timesteps.device) * -math.log(10000) / (dim // 2 - 1)
    angles = timesteps[:, None] * torch.exp(exponent)[None, :]
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class NoiseSchedule:
    """Deterministic DDIM (Song et al. 2020), squared-cosine schedule, noise prediction, x0 clipped to [-1, 1].

    Equal to diffusers' ``DDIMScheduler(num_train_steps, beta_schedule="squaredcos_cap_v2")`` as OFT uses it.
    """

    def __init__(self, num_train_steps: int) -> None:
        self.num_train_steps = num_train_steps

    def timesteps(self, num_steps: int) -> list[int]:
        """Return the noise levels of ``num_steps`` denoising steps, from noisy to clean."""
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or not 1 <= num_steps <= self.num_train_steps:
            raise OpenVLAValueError(f"num_inference_steps must be 1 to {self.num_train_steps}, got {num_steps!r}.")
        return [step * (self.num_train_steps // num_steps) for step in reversed(range(num_steps))]

    def step(self, predicted_noise: torch.Tensor, timestep: int, noisy: torch.Tensor, num_steps: int) -> torch.Tensor:
        """Take one of ``num_steps`` denoising steps, from the level ``timestep`` to the one below it."""
        alphas = alphas_cumprod(self.num_train_steps)
        previous = timestep - self.num_train_steps // num_steps
        alpha = alphas[timestep]
        previous_alpha = alphas[previous] if previous >= 0 else torch.tensor(1.0)
        clean = (noisy - (1 - alpha) ** 0.5 * predicted_noise) / alpha**0.5
        return previous_alpha**0.5 * clean.clamp(-1.0, 1.0) + (1 - previous_alpha) ** 0.5 * predicted_noise


@lru_cache
def alphas_cumprod(num_train_steps: int) -> torch.Tensor:
    """Return the clean signal's share (of variance) at every level, float32; 5.x would leave a buffer uninitialised."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    times = [step / num_train_steps for step in range(num_train_steps + 1)]
    betas = [min(1 - alpha_bar(later) / alpha_bar(now), MAX_BETA) for now, later in zip(times, times[1:])]
    with torch.inference_mode(False):  # the cached tensor may be used in training later
        return torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float32, device="cpu"), dim=0)
