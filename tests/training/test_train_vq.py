"""Training of VQ autoencoders: the authors' updates, chunks, resuming, folders that convert."""

import json
import warnings

import numpy as np
import pytest
import torch
from memory_dataset import EPISODE_LENGTHS, FIELDS, memory_reader
from minivla import MINIVLA, convert_run
from openvla import load_policy
from openvla.__main__ import main
from openvla.conversion.vq_format import read_vq
from openvla.data.statistics import as_norm_stats
from openvla.data.torch_dataset import TorchDatasetReader
from openvla.training.train_vq import ActionChunks, VQTrainer, VQTrainingConfig, format_report, pad_end, train_vq
from reference import FIXTURES, write_json

# The authors' code differs by less between CPUs.
LOSS_ATOL, PARAMETER_ATOL = 1e-5, 2e-6
SMALL = VQTrainingConfig(chunk_length=4, num_codes=8, num_rounds=3, latent_dim=8, batch_size=16, epochs=4)


class Data:
    """Datasets in memory."""

    def __init__(self, *readers, weights=None):
        self.readers, self.weights = readers, weights or [1.0] * len(readers)
        self.statistics = as_norm_stats(readers, progress=False)


def arm_reader(name="arm", lengths=EPISODE_LENGTHS):
    """Return a reader of smooth motions in memory with a gripper that is 0 or 1."""
    random, steps = np.random.RandomState(len(name)), []
    phase = random.uniform(0, 6, 6)
    for length in lengths:
        for step in range(length):
            action = np.append(0.02 * np.sin(phase + 0.4 * step), float(step > length / 2))
            steps.append({"image": np.zeros((4, 6, 3), np.uint8), "action": action, "task": "go"})
    return TorchDatasetReader(steps, name, FIELDS, episode_lengths=lengths)


@pytest.fixture(scope="module")
def data():
    return Data(arm_reader())


def test_three_updates_equal_the_authors_code():
    trainer = VQTrainer(json.loads((MINIVLA / "vq_train_config.json").read_text()))
    trainer.load_state_dict(torch.load(MINIVLA / "vq_train_start.pt", weights_only=True))
    golden = np.load(MINIVLA / "vq_train.npz")
    for index, batch in enumerate(golden["batches"]):
        result = trainer.update(torch.from_numpy(batch))
        assert np.array_equal(result["codes"].numpy(), golden["codes"][index])
        for name, key in (("l1_loss", "encoder_loss"), ("commitment_loss", "vq_loss"), ("mse_loss", "recon_loss")):
            np.testing.assert_allclose(result[name].item(), golden[key][index], rtol=0, atol=LOSS_ATOL)
    assert trainer.step == 3
    state = trainer.state_dict()
    codebooks = state["vq_embedding"]
    for tensor, key in (
        (state["encoder"]["fc.weight"], "encoder_fc_weight_after"),
        (state["decoder"]["fc.bias"], "decoder_fc_bias_after"),
        (codebooks["layers.0._codebook.cluster_size"], "cluster_size0_after"),
        (codebooks["layers.1._codebook.embed_avg"], "embed_avg1_after"),
    ):
        np.testing.assert_allclose(tensor.numpy(), golden[key], rtol=0, atol=PARAMETER_ATOL)
    # Entries of codes that nothing is near are divided by nearly nothing: relative.
    embed = codebooks["layers.0._codebook.embed"]
    np.testing.assert_allclose(embed.numpy(), golden["codebook0_after"], rtol=1e-5, atol=PARAMETER_ATOL)


def test_a_new_autoencoder_begins_as_the_authors_do():
    """Orthogonal layers without biases; codebooks uniform, counts of zero; names and shapes of their state dict."""
    golden = torch.load(MINIVLA / "vq_train_start.pt", weights_only=True)
    state = VQTrainer(json.loads((MINIVLA / "vq_train_config.json").read_text())).state_dict()
    for part in ("encoder", "decoder", "vq_embedding"):
        assert {name: tensor.shape for name, tensor in state[part].items()} == {
            name: tensor.shape for name, tensor in golden[part].items()
        }
    assert state["optimizer"]["param_groups"][0]["params"] == golden["optimizer"]["param_groups"][0]["params"]
    for name in ("lr", "betas", "eps", "weight_decay"):
        assert state["optimizer"]["param_groups"][0][name] == golden["optimizer"]["param_groups"][0][name]
    weight = state["encoder"]["encoder.2.weight"]
    torch.testing.assert_close(weight @ weight.T, torch.eye(128), rtol=0, atol=1e-5)
    for states in (state, golden):
        embed = states["vq_embedding"]["layers.1._codebook.embed"]
        bound = (6 / embed[0].numel()) ** 0.5
        assert 0.9 * bound < embed.abs().max() <= bound
        assert torch.equal(states["vq_embedding"]["layers.1._codebook.embed_avg"], embed)
        assert not states["vq_embedding"]["layers.1._codebook.cluster_size"].any()
        assert not any(
            states[part][name].any() for part in ("encoder", "decoder") for name in states[part] if "bias" in name
        )


@pytest.mark.parametrize(("name", "absolute"), [("gripper_absolute", [6]), ("all_relative", [])])
def test_chunks_end_as_in_the_authors_data(name, absolute):
    windows = np.load(MINIVLA / "windows.npz")
    padded = pad_end(windows["action"], np.isin(np.arange(7), absolute), 7)
    chunks = np.stack([padded[step : step + 8] for step in range(len(windows["action"]))])
    assert np.array_equal(chunks, windows[f"w1_f7_{name}/action"])


def test_chunks_are_normalised_and_stay_in_their_episode(data):
    chunks, statistics = ActionChunks(data.readers, data.statistics, [1.0], 4), data.statistics["arm"]["action"]
    assert len(chunks) == sum(EPISODE_LENGTHS)
    every = np.arange(len(chunks))
    values, first = chunks.take(every).numpy(), 0
    for index, length in enumerate(EPISODE_LENGTHS):
        actions = data.readers[0][index].actions
        last = values[first + length - 1]
        assert not last[1:, :6].any()
        assert (last[:, 6] == actions[-1, 6]).all()
        low, high = np.array(statistics["q01"]), np.array(statistics["q99"])
        expected = np.clip(2 * (actions - low) / (high - low + 1e-8) - 1, -1, 1)[:, :6].astype(np.float32)
        assert np.array_equal(values[first : first + length, 0, :6], expected)
        assert chunks.is_padding(every)[first + length - 2].tolist() == [False, False, True, True]
        first += length
    batches = [torch.cat(list(chunks.batches(epoch, 9, seed=0))) for epoch in (0, 0, 1)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    assert len(batches[0]) == 54  # full batches only
    assert sorted(map(tuple, torch.cat(list(chunks.batches(3, 54, 0))).flatten(1).tolist())) == sorted(
        map(tuple, values.reshape(54, -1).tolist())
    )


def test_weights_decide_how_often_a_dataset_is_drawn():
    readers = [arm_reader("one"), arm_reader("other2", (54,))]
    data = Data(*readers, weights=[3.0, 1.0])
    chunks = ActionChunks(data.readers, data.statistics, data.weights, 1)
    chunks._rows = torch.arange(108.0)[:, None]
    drawn = torch.cat([batch for epoch in range(40) for batch in chunks.batches(epoch, 54, 0)])
    assert 0.72 < (drawn < 54).float().mean() < 0.78


def test_a_run_learns_and_its_folder_is_what_openvla_mini_writes(data, tmp_path):
    config = VQTrainingConfig(**{**vars(SMALL), "epochs": 150, "num_codes": 16, "logging_steps": 3})
    report = train_vq(data, tmp_path / "vq", config)
    lines = [json.loads(line) for line in (tmp_path / "vq/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[:2]] == [3, 6]
    assert lines[-1]["step"] == 450
    assert np.mean([line["l1_loss"] for line in lines[-5:]]) < 0.4 * lines[0]["l1_loss"]
    native = json.loads((tmp_path / "vq/config.json").read_text())
    assert set(native) == set(json.loads((MINIVLA / "vq_train_config.json").read_text()))
    assert (native["input_dim_h"], native["input_dim_w"], native["vqvae_groups"]) == (4, 7, 3)
    assert read_vq(tmp_path / "vq").fields["chunk_length"] == 4
    errors = report["mean_absolute_error"]["arm"]
    assert list(errors) == ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]
    assert report["units"]["arm"][-1]
    assert 0 < max(list(errors.values())[:6]) < 0.3 * 0.02  # of the motion's amplitude
    assert errors["gripper"] < 0.2
    assert all(1 < used <= 16 for used in report["codes_used"])
    assert json.loads((tmp_path / "vq/reconstruction.json").read_text()) == report


def test_an_interrupted_run_continues_to_the_same_result(data, tmp_path):
    train_vq(data, tmp_path / "whole", SMALL)
    train_vq(data, tmp_path / "halves", VQTrainingConfig(**{**vars(SMALL), "epochs": 2}))
    (tmp_path / "halves/checkpoints/.model.pt.partial").write_bytes(b"of an interrupted write")
    train_vq(data, tmp_path / "halves", SMALL)
    whole, halves = (
        torch.load(tmp_path / name / "checkpoints/model.pt", weights_only=True) for name in ("whole", "halves")
    )
    for part in ("encoder", "decoder", "vq_embedding"):
        assert all(torch.equal(tensor, halves[part][name]) for name, tensor in whole[part].items())
    assert not list((tmp_path / "whole/checkpoints").glob(".*"))


def test_a_loss_that_is_not_finite_is_not_saved(data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        VQTrainer, "update", lambda *_: {"l1_loss": torch.tensor(torch.nan), "codes": torch.zeros(2, 3)}
    )
    with pytest.raises(ValueError, match="The losses at step 3 are {'l1_loss': nan}"):
        train_vq(data, tmp_path / "vq", SMALL)
    assert not (tmp_path / "vq/checkpoints/model.pt").exists()


def test_what_cannot_be_right_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="54 chunks, fewer than a batch of 1028; set a smaller batch_size"):
        train_vq(data, tmp_path / "vq", VQTrainingConfig())
    with pytest.raises(ValueError, match="num_codes must be above 0, got 0"):
        VQTrainingConfig(num_codes=0)
    train_vq(data, tmp_path / "vq", SMALL)
    with pytest.raises(ValueError, match=r"another config: \['num_codes'\] differ.*give another folder"):
        train_vq(data, tmp_path / "vq", VQTrainingConfig(**{**vars(SMALL), "num_codes": 9}))
    with pytest.raises(ValueError, match=r"another datasets: \['arm', 'lab'\] differ"):
        train_vq(Data(arm_reader("lab")), tmp_path / "vq", SMALL)
    with pytest.raises(ValueError, match="holds a run of 4 epochs, more than 2; set as many or more"):
        train_vq(data, tmp_path / "vq", VQTrainingConfig(**{**vars(SMALL), "epochs": 2}))
    (tmp_path / "vq/training.json").unlink()
    with pytest.raises(ValueError, match="is not empty and holds no run of openvla train-vq"):
        train_vq(data, tmp_path / "vq", SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # made-up actions
        mixture = Data(arm_reader(), memory_reader("wide", width=9))
    with pytest.raises(ValueError, match="same number of action dimensions, got {'arm': 7, 'wide': 9}"):
        train_vq(mixture, tmp_path / "other", SMALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder that the command wrote, with the sizes of MiniVLA's LIBERO autoencoder."""
    folder = tmp_path_factory.mktemp("command")
    write_json(folder / "run.yaml", {"data": [{"path": str(FIXTURES / "lerobot_v3")}], "accept": [], "max_steps": 5})
    options = ["--num-codes", "128", "--latent-dim", "16", "--batch-size", "4", "--epochs", "2", "--device", "cpu"]
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")  # made-up actions
        patch.setenv("OPENVLA_CACHE", str(folder / "cache"))
        assert main(["train-vq", str(folder / "run.yaml"), str(folder / "vq"), *options]) == 0
    return folder / "vq"


def test_the_command_prints_errors_in_the_units_of_the_actions(trained):
    printed = format_report(json.loads((trained / "reconstruction.json").read_text())).splitlines()
    assert printed[0].startswith("21 chunks; codes used of 128, by round: [")
    assert printed[1] == "lerobot_v3: mean absolute error of reconstructed actions"
    assert [line.split()[0] for line in printed[2:]] == ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]
    assert all(line.endswith(" dataset units") for line in printed[2:])  # no Open X dataset, whose units are known


def test_a_converted_model_decodes_with_the_trained_autoencoder(trained, tmp_path):
    _, hub = convert_run("vq_libero", tmp_path, trained)
    model = load_policy(hub, unnorm_key="libero_90", device="cpu").model
    saved = read_vq(trained).tensors
    assert all(torch.equal(tensor, saved[f"action_vq.{name}"]) for name, tensor in model.action_vq.state_dict().items())
    chunks = np.random.RandomState(0).uniform(-1, 1, (5, 8, 7))
    trainer = VQTrainer(json.loads((trained / "config.json").read_text()))
    trainer.load_state_dict(torch.load(trained / "checkpoints/model.pt", weights_only=True))
    codes = trainer.update(torch.from_numpy(chunks).float())["codes"].numpy()
    assert np.array_equal(model.action_tokenizer.codes(model.action_tokenizer.encode(chunks)), codes)


def test_a_wrong_dataset_is_one_line(tmp_path, capsys):
    assert main(["train-vq", str(tmp_path / "nothing"), str(tmp_path / "vq")]) == 2
    assert "No dataset at" in capsys.readouterr().err
