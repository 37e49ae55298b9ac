"""The heads' shapes and the noise schedule, in every bit that of diffusers, which OpenVLA-OFT uses."""

import math

import pytest
import torch
from openvla.heads_openvla import (
    DiffusionActionHead,
    FeatureProjector,
    L1RegressionActionHead,
    NoiseSchedule,
    timestep_embedding,
)
from openvla.training.parallel_loss import add_noise

BATCH, CHUNK, ACTION_DIM, HIDDEN = 2, 8, 7, 16


def ddim_scheduler(num_train_steps, num_steps=1):
    pytest.importorskip("diffusers")
    from diffusers.schedulers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=num_train_steps, beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_steps", [1, 3, 7, 10, 50])
@pytest.mark.parametrize("num_train_steps", [50, 100])
def test_denoising_equals_diffusers(num_train_steps, num_steps, dtype):
    scheduler, schedule = ddim_scheduler(num_train_steps, num_steps), NoiseSchedule(num_train_steps)
    assert schedule.timesteps(num_steps) == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    noisy = expected = torch.randn(BATCH, CHUNK, ACTION_DIM, generator=generator).to(dtype)
    for timestep in schedule.timesteps(num_steps):
        noise = torch.randn(noisy.shape, generator=generator).to(dtype)
        noisy = schedule.step(noise, timestep, noisy, num_steps)
        expected = scheduler.step(noise, timestep, expected).prev_sample
        assert noisy.dtype == dtype
        assert torch.equal(noisy, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_train_steps", [50, 100])
def test_added_noise_equals_diffusers(num_train_steps, dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (num_train_steps, CHUNK, ACTION_DIM)
    clean, noise = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    levels = torch.arange(num_train_steps)
    noisy = add_noise(num_train_steps, clean, noise, levels)
    assert torch.equal(noisy, ddim_scheduler(num_train_steps).add_noise(clean, noise, levels))


@pytest.mark.lane
def test_last_step_gives_clean_actions_within_bounds():
    schedule = NoiseSchedule(50)
    clean = torch.linspace(-1, 1, CHUNK * ACTION_DIM).view(1, CHUNK, ACTION_DIM)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = add_noise(50, clean, noise, torch.tensor([20]))
    torch.testing.assert_close(schedule.step(noise, 20, noisy, num_steps=1), clean)
    assert schedule.step(-5 * noise, 20, noisy, num_steps=1).abs().max() == 1


@pytest.mark.lane
@pytest.mark.parametrize("num_steps", [0, 51, 10.0, True, None])
def test_impossible_number_of_steps_is_refused(num_steps):
    with pytest.raises(ValueError, match=r"must be 1 to 50, got"):
        NoiseSchedule(50).timesteps(num_steps)


@pytest.mark.lane
def test_timestep_embedding_is_sines_then_cosines():
    embedding = timestep_embedding(torch.tensor([0, 3]), 6)
    angles = [3 * 10000 ** (-i / 2) for i in range(3)]
    expected = [[0] * 3 + [1] * 3, [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]]
    torch.testing.assert_close(embedding, torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(embedding, timestep_embedding(torch.tensor([0.0, 3.0]), 6))  # levels come as either


@pytest.mark.lane
@pytest.mark.parametrize("head", [L1RegressionActionHead, DiffusionActionHead])
def test_head_makes_each_action_of_its_own_hidden_states(head):
    torch.manual_seed(0)
    head = head(HIDDEN, ACTION_DIM).eval()
    hidden = torch.randn(BATCH, CHUNK * ACTION_DIM, HIDDEN)
    with torch.no_grad():
        actions = head(hidden)
        hidden[:, 3 * ACTION_DIM] += 1  # the first number of the fourth action
        moved = (head(hidden) != actions).any(2)
    assert actions.shape == (BATCH, CHUNK, ACTION_DIM)
    assert moved[:, 3].all()
    assert moved.sum() == BATCH


@pytest.mark.lane
def test_projector_takes_states_and_single_noisy_numbers():
    assert FeatureProjector(8, HIDDEN)(torch.zeros(BATCH, 8)).shape == (BATCH, HIDDEN)
    assert FeatureProjector(1, HIDDEN)(torch.zeros(BATCH, 56, 1)).shape == (BATCH, 56, HIDDEN)
