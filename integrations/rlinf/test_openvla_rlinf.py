"""The RLinf extension in RLinf's own rollout and actor code, on one CPU: without Ray, the rest is theirs."""

import asyncio
import os
import types

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from openvla.benchmarking.sizes import CHUNK_FIELDS
from openvla.errors_openvla import OpenVLAValueError
from openvla.tiny import build_tiny
from rlinf.data.embodied_io_struct import (
    ChunkStepResult,
    EmbodiedRolloutResult,
    RolloutResult,
    convert_trajectories_to_batch,
)
from rlinf.hybrid_engines.fsdp.fsdp_model_manager import FSDPModelManager
from rlinf.hybrid_engines.weight_syncer import WeightSyncer
from rlinf.models import get_model
from rlinf.scheduler import Worker
from rlinf.scheduler.cluster.utils import load_user_extension_module
from rlinf.utils.logging import get_logger
from rlinf.workers.actor.fsdp_actor_worker import EmbodiedFSDPActor
from rlinf.workers.rollout.hf.huggingface_worker import MultiStepRolloutWorker

ENVIRONMENTS, STEPS = 4, 2
TASKS = ["open the drawer", "pick up the red block and put it down"] * 2
KINDS = {"tokens": {}, "chunks": {**CHUNK_FIELDS, "action_head": None}}


@pytest.fixture(scope="session", autouse=True)
def one_worker(tmp_path_factory):
    """Make this process RLinf's only worker, on the CPU."""
    rendezvous = tmp_path_factory.mktemp("rendezvous") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    os.environ.update(LOCAL_RANK="0", RLINF_EXT_MODULE="openvla_rlinf")
    Worker.torch_device_type = "cpu"
    Worker.torch_platform = types.SimpleNamespace(
        is_available=torch.cpu.is_available,
        set_device=torch.cpu.set_device,
        current_device=lambda: torch.device("cpu"),
        empty_cache=lambda: None,
        ipc_collect=lambda: None,
        synchronize=torch.cpu.synchronize,
    )
    load_user_extension_module()
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return a saved checkpoint of each kind."""
    paths = {}
    for name, fields in KINDS.items():
        model, processor = build_tiny(**fields)
        paths[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(paths[name])
        processor.save_pretrained(paths[name])
    return paths


def configuration(folder, kind, **model):
    """Return RLinf's configuration, the fields that its code reads here."""
    settings = {
        "model_type": "openvla_hf",
        "model_path": str(folder),
        "precision": "fp32",
        "is_lora": False,
        "action_dim": 7,
        "num_action_chunks": 8 if kind == "chunks" else 1,
        "unnorm_key": "untrained" if kind == "chunks" else None,
        "robot_convention": "libero",
        "max_prompt_length": 96,
        "add_value_head": True,
        **model,
    }
    sampling = {"do_sample": True, "temperature_train": 1.6, "temperature_eval": -1, "top_k": -1, "top_p": 1.0}
    mixed = {"param_dtype": None, "reduce_dtype": None, "buffer_dtype": None}
    return OmegaConf.create(
        {
            "runner": {"task_type": "embodied"},
            "algorithm": {
                "adv_type": "gae",
                "loss_type": "actor_critic",
                "logprob_type": "token_level",
                "reward_type": "chunk_level",
                "entropy_type": "token_level",
                "entropy_bonus": 0.01,
                "clip_ratio_high": 0.2,
                "clip_ratio_low": 0.2,
                "value_clip": 0.2,
                "huber_delta": 10.0,
                "group_size": 2,
            },
            "env": {"train": {"rollout_epoch": 1, "auto_reset": True, "ignore_terminations": True,
                              "max_episode_steps": 64}},
            "rollout": {
                "model": {"precision": settings["precision"], "model_path": str(folder)},
                "sampling_params": {**sampling, "max_new_tokens": 7},
            },
            "actor": {
                "seed": 0,
                "model": settings,
                "global_batch_size": ENVIRONMENTS * STEPS,
                "micro_batch_size": ENVIRONMENTS,
                "optim": {"lr": 1e-3, "value_lr": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.95, "clip_grad": 1.0},
                "fsdp_config": {
                    "strategy": "fsdp2",
                    "mixed_precision": mixed,
                    "amp_autocast": {"enabled": False},
                    "cpu_offload": False,
                    "offload_pin_memory": False,
                    "reshard_after_forward": True,
                    "enable_gradient_accumulation": True,
                    "grad_scaler": {"enabled": False},
                },
            },
        }
    )  # fmt: skip


class Rollout(MultiStepRolloutWorker):
    """RLinf's rollout worker; its constructor asks Ray for its place."""

    def __init__(self, cfg):
        self.cfg, self.model_cfg, self.algorithm_cfg = cfg, cfg.actor.model, cfg.algorithm
        self.enable_cuda_graph = self.enable_offload = False
        self.expert_model = None
        self._timer_metrics, self._accelerator_type = {}, None
        self.init_worker()


class Actor(EmbodiedFSDPActor):
    """RLinf's actor; its constructor asks Ray for its place."""

    def __init__(self, cfg):
        self.cfg, self._rank, self._world_size = cfg, 0, 1
        FSDPModelManager.__init__(self, cfg.actor, 1, 0)
        self.enable_offload = self.enable_sft_co_train = False
        self.gradient_accumulation = cfg.actor.global_batch_size // cfg.actor.micro_batch_size
        self._timer_metrics, self._accelerator_type, self._logger = {}, None, get_logger()
        self.init_worker()


def observations(seed):
    """Return what RLinf's LIBERO environment returns."""
    random = np.random.RandomState(seed)
    frames = torch.from_numpy(random.randint(0, 256, (2, ENVIRONMENTS, 64, 64, 3), dtype=np.uint8))
    states = torch.from_numpy(random.uniform(-1, 1, (ENVIRONMENTS, 8)).astype(np.float32))
    return {
        "main_images": frames[0],
        "wrist_images": frames[1],
        "extra_view_images": None,
        "states": states,
        "task_descriptions": TASKS,
    }


def collect(rollout, cfg):
    """Return the batch that RLinf's actor receives after some steps with random rewards."""
    random = torch.Generator().manual_seed(0)
    collected = EmbodiedRolloutResult(max_episode_length=STEPS)
    chunk = cfg.actor.model.num_action_chunks
    done = torch.zeros(ENVIRONMENTS, chunk, dtype=torch.bool)
    for step in range(STEPS + 1):
        actions, result = rollout.predict(observations(step))
        answer = RolloutResult(
            actions=actions,
            prev_logprobs=result["prev_logprobs"],
            prev_values=result["prev_values"],
            forward_inputs=result["forward_inputs"],
        )
        last = step == STEPS  # its value alone is needed
        collected.append_step_result(
            ChunkStepResult(
                actions=None if last else answer.actions.flatten(1),
                prev_logprobs=None if last else answer.prev_logprobs,
                prev_values=answer.prev_values,
                forward_inputs={} if last else answer.forward_inputs,
                rewards=None if last else torch.rand(ENVIRONMENTS, chunk, generator=random),
                dones=done,
                terminations=done,
                truncations=done,
            )
        )
    return convert_trajectories_to_batch([collected.to_trajectory()])


def train(actor, batch):
    """Run one iteration of RLinf's actor; return its metrics."""
    actor.rollout_batch = actor._process_received_rollout_batch(batch)
    actor.compute_advantages_and_returns()
    return actor.run_training()


def synchronize(actor, rollout):
    """Send the actor's weights to the rollout worker through RLinf's syncer."""
    queue = asyncio.Queue()
    syncer = WeightSyncer.create(
        OmegaConf.create(
            {"type": "bucket", "bucket": {"bucket_size": 100_000, "bucket_dtype": None, "bucket_device": "cpu",
                                          "is_agent": False, "load_instant": False}}
        )
    )  # fmt: skip

    async def exchange():
        state = actor.get_rollout_state_dict()
        await syncer.init_sender(state, actor.param_names_need_sync, queue.put)
        await asyncio.gather(syncer.sync(state, queue.put, 1), syncer.apply(rollout.hf_model, queue.get))

    asyncio.run(exchange())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_rlinf_trains_the_model(folders, kind, lora):
    adapter = {"is_lora": True, "lora_rank": 4, "lora_path": None} if lora else {}
    cfg = configuration(folders[kind], kind, **adapter)
    torch.manual_seed(0)
    rollout, actor = Rollout(cfg), Actor(cfg)
    synchronize(actor, rollout)  # both began with a value head of their own
    before = {name: tensor.full_tensor().clone() for name, tensor in actor.model.state_dict().items()}
    metrics = train(actor, collect(rollout, cfg))
    assert metrics["actor/ratio"] == 1
    assert metrics["actor/approx_kl"] == 0
    assert metrics["actor/clip_fraction"] == 0
    assert metrics["actor/grad_norm"] > 0
    assert metrics["critic/value_loss"] > 0
    changed = {
        name for name, tensor in actor.model.state_dict().items() if not torch.equal(tensor.full_tensor(), before[name])
    }
    assert any("value_head" in name for name in changed)
    assert any("q_proj" in name for name in changed)
    assert all("lora_" in name or "value_head" in name for name in changed) or not lora
    synchronize(actor, rollout)
    for name, tensor in rollout.hf_model.state_dict().items():
        assert torch.equal(tensor, actor.model.state_dict()[name].full_tensor()), name
    assert train(actor, collect(rollout, cfg))["actor/ratio"] == 1  # the synchronised weights are the actor's


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_ratio_is_one_in_bfloat16_under_fsdp(folders, checkpointing):
    """The parameters are float32, the passes of the actor bfloat16; those of the rollout worker are bfloat16."""
    cfg = configuration(folders["chunks"], "chunks", add_value_head=False)
    cfg.rollout.model.precision = "bf16"
    cfg.actor.fsdp_config.gradient_checkpointing = checkpointing
    cfg.actor.fsdp_config.mixed_precision = {"param_dtype": "bf16", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    cfg.algorithm.update(adv_type="grpo", loss_type="actor", logprob_type="chunk_level", entropy_bonus=0)
    cfg.env.train.update(auto_reset=False, ignore_terminations=False)  # as its recipes for GRPO
    metrics = train(Actor(cfg), collect(Rollout(cfg), cfg))
    assert metrics["actor/ratio"] == 1
    assert metrics["actor/grad_norm"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_actions_are_in_the_convention_of_the_environment(folders, kind):
    torch.manual_seed(0)
    policies = {}
    for convention in ("raw", "libero"):
        policies[convention] = get_model(configuration(folders[kind], kind, robot_convention=convention).actor.model)
    results = {
        name: model.eval().predict_action_batch(observations(0), mode="eval") for name, model in policies.items()
    }
    raw, actions = (results[name][0].numpy() for name in ("raw", "libero"))
    assert raw.shape == (ENVIRONMENTS, policies["raw"].config.chunk_length, 7)
    assert np.array_equal(actions[..., :-1], raw[..., :-1])
    assert np.array_equal(actions[..., -1], np.where(raw[..., -1] > 0.5, -1, 1))
    greedy = policies["raw"].predict_action_batch(
        observations(0), do_sample=True, temperature=1e-6, calculate_values=False
    )
    assert np.array_equal(greedy[0], results["raw"][0])
    assert torch.equal(greedy[1]["prev_values"], torch.zeros(ENVIRONMENTS, 1))


def test_every_prompt_has_max_prompt_length(folders):
    model = get_model(configuration(folders["tokens"], "tokens").actor.model)
    _, result = model.predict_action_batch(observations(0))
    assert result["forward_inputs"]["input_ids"].shape == (ENVIRONMENTS, 96)
    assert result["prev_logprobs"].shape == (ENVIRONMENTS, 7)
    assert result["prev_values"].shape == (ENVIRONMENTS, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_action_chunks": 8}, "num_action_chunks is 8, but .* has 1"),
        ({"robot_convention": None}, "robot_convention is missing"),
        ({"robot_convention": "libro"}, "Did you mean 'libero'"),
        ({"value_type": "action_level"}, "value_type must be chunk_level"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folders, changes, message):
    with pytest.raises(OpenVLAValueError, match=message):
        get_model(configuration(folders["tokens"], "tokens", **changes).actor.model)


def test_arguments_that_would_be_ignored_are_refused(folders):
    model = get_model(configuration(folders["tokens"], "tokens", add_value_head=False).actor.model)
    with pytest.raises(OpenVLAValueError, match="top_p must be 1.0"):
        model.predict_action_batch(observations(0), top_p=0.9)
    _, result = model.predict_action_batch(observations(0))
    with pytest.raises(OpenVLAValueError, match="compute_values needs add_value_head"):
        model(forward_inputs=result["forward_inputs"], compute_values=True)
    other = model.predict_action_batch(observations(0), temperature=0.5)[1]["forward_inputs"]
    mixed = {name: torch.cat([value, other[name]]) for name, value in result["forward_inputs"].items()}
    with pytest.raises(OpenVLAValueError, match=r"several temperature: \[0.5, 1.0\]"):
        model(forward_inputs=mixed, compute_logprobs=True)
