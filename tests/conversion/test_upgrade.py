"""openvla upgrade: folders of any age get today's code, weights are kept, and a failure changes nothing."""

import errno
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import transformers
from exchange import predict
from openvla import AutoModelForVision2Seq, AutoProcessor, OpenVLAForActionPrediction, quantization_config
from openvla.__main__ import main
from openvla.compatibility_openvla import QUANTIZES_ON_CPU
from openvla.conversion import upgrade as module
from openvla.conversion.upgrade import upgrade
from openvla.conversion.verify import verify
from openvla.tiny import build_tiny, build_tokenizer
from reference import FIXTURES, REPOSITORY, native_run, published_folder, write_json

pytestmark = pytest.mark.lane

# One training step in a process that has no openvla: the folder's own code.
STEP = """
import sys
sys.modules["openvla"] = None
import numpy as np, torch, transformers

folder = sys.argv[1]
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model_class = getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
model = model_class.from_pretrained(folder, trust_remote_code=True).train()
inputs = processor(instruction="open the drawer", images=np.zeros((224, 224, 3), np.uint8))
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
losses = []
for _ in range(2):
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
assert losses[1] < losses[0], losses
print("trained")
"""


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def dropped_code(folder):
    """Code files of an older save that are shipped no more."""
    return sorted(
        {path.name for path in folder.glob("*_openvla.py")} - {p.name for p in REPOSITORY.glob("*_openvla.py")}
    )


def train_one_step(folder, cwd):
    return subprocess.run([sys.executable, "-c", STEP, str(folder)], cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def saved(tmp_path, tiny):
    """A folder that commit 0bffe60 wrote, with the weights of today's tiny model, which are the same."""
    folder = tmp_path / "saved"
    with tarfile.open(FIXTURES / "saved_by_0bffe60.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    tiny.model.save_pretrained(tmp_path / "weights")
    shutil.move(tmp_path / "weights" / "model.safetensors", folder)
    return folder


def test_a_folder_of_our_older_code_trains_again(saved, tiny, tmp_path):
    before = train_one_step(saved, tmp_path)
    breaks = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
    assert ("unexpected keyword argument 'cache'" in before.stderr) == breaks
    inode = (saved / "model.safetensors").stat().st_ino
    shipped = {path.name for path in REPOSITORY.glob("*_openvla.py")}
    dropped = dropped_code(saved)
    assert {"device_images_openvla.py", "jpeg_openvla.py", "norm_stats_openvla.py"} <= {*dropped}
    removed = upgrade(saved, tmp_path / "new")
    assert removed == dropped
    assert {"adapter_files_openvla.py", "adapters_openvla.py"} <= {*removed}
    assert (tmp_path / "new" / "model.safetensors").stat().st_ino == inode  # untouched, and not copied
    assert {path.name for path in (tmp_path / "new").glob("*.py")} == shipped
    after = train_one_step(tmp_path / "new", tmp_path)
    assert after.stdout.strip() == "trained", after.stderr[-2000:]
    model = AutoModelForVision2Seq.from_pretrained(tmp_path / "new").eval()
    assert predict(model, AutoProcessor.from_pretrained(tmp_path / "new")) == predict(tiny.model, tiny.processor)
    assert verify(tmp_path / "new") == len(model.state_dict())


def test_a_published_folder_is_upgraded(tmp_path):
    source = published_folder("fused", tmp_path / "old", pad_token_id=build_tokenizer().pad_token_id)
    for name in ("modeling_prismatic.py", "configuration_prismatic.py", "processing_prismatic.py"):
        (source / name).write_text("import timm_of_long_ago\n")
    (source / "my_robot.py").write_text("mine")
    (source / "eval_openvla.py").write_text("mine")
    (source / "README.md").write_text("my card")
    (source / "logs").mkdir()
    (source / "logs" / "losses.txt").write_text("1 2 3")
    generation = json.loads((source / "generation_config.json").read_text()) | {"max_new_tokens": 9}
    write_json(source / "generation_config.json", generation)
    before = contents(source)
    removed = upgrade(source, tmp_path / "new")
    assert removed == ["configuration_prismatic.py", "modeling_prismatic.py", "processing_prismatic.py"]
    assert contents(source) == before
    after = contents(tmp_path / "new")
    kept_files = {
        "my_robot.py",
        "eval_openvla.py",
        "README.md",
        "logs/losses.txt",
        "model.safetensors",
        "generation_config.json",
    }
    assert {name: after[name] for name in kept_files} == {name: before[name] for name in kept_files}
    assert not set(removed) & set(after)
    assert json.loads(after["config.json"])["auto_map"]["AutoModel"] == "modeling_openvla.OpenVLAForActionPrediction"
    assert verify(tmp_path / "new")


def test_code_that_is_no_longer_shipped_is_removed(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path / "saved")
    dropped = ["answers_openvla.py", "fast_openvla.py", "graphs_openvla.py", "own_functions_openvla.py"]
    for name in dropped:
        (tmp_path / "saved" / name).write_text("from __future__ import annotations\n")
    assert upgrade(tmp_path / "saved", in_place=True) == dropped
    shipped = {path.name for path in REPOSITORY.glob("*_openvla.py")}
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} <= shipped


def test_a_second_upgrade_in_place_changes_nothing(saved, tmp_path, capsys):
    (saved / ".git").mkdir()
    (saved / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (saved / "notes.txt").write_text("mine")
    weights = (saved / "model.safetensors").read_bytes()
    assert main(["upgrade", str(saved), "--in-place"]) == 0
    assert "new code files" in capsys.readouterr().out
    assert (saved / ".git" / "HEAD").read_text() == "ref: refs/heads/main"
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "model.safetensors").read_bytes() == weights
    first = contents(saved)
    assert main(["upgrade", str(saved), "--in-place"]) == 0
    assert "current already" in capsys.readouterr().out
    assert contents(saved) == first
    assert verify(saved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "weights"]


def test_an_adapter_is_upgraded(saved, tmp_path):
    pytest.importorskip("peft")
    upgrade(saved, tmp_path / "base")
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "base")
    model.enable_lora(r=2, targets="language")
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "modeling_openvla.py").write_text("raise RuntimeError('code of long ago')")
    record = (tmp_path / "adapter" / "openvla_adapter.json").read_bytes()
    upgrade(tmp_path / "adapter", tmp_path / "new")
    expected, files = contents(tmp_path / "adapter"), contents(tmp_path / "new")
    assert {name for name in files if not name.endswith(".py")} == {n for n in expected if not n.endswith(".py")}
    assert files["openvla_adapter.json"] == record
    assert files["adapter_model.safetensors"] == expected["adapter_model.safetensors"]
    assert is_current(files["modeling_openvla.py"])
    OpenVLAForActionPrediction.from_pretrained(tmp_path / "new")


def test_an_adapter_keeps_its_statistics_and_its_processor(saved, tiny, tmp_path):
    pytest.importorskip("peft")
    upgrade(saved, tmp_path / "base")
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path / "base")
    model.enable_lora(r=2, targets="language")
    model.save_pretrained(tmp_path / "adapter")
    tiny.processor.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "dataset_statistics.json"
    mine = {"my_robot": {"action": {"q01": [-5.0] * 7, "q99": [5.0] * 7, "mask": [True] * 7}}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **mine}))
    for name in ("preprocessor_config.json", "tokenizer_config.json"):  # as published processors name their code
        fields = json.loads((tmp_path / "adapter" / name).read_text())
        fields["auto_map"] = {"AutoProcessor": "processing_prismatic.PrismaticProcessor"}
        write_json(tmp_path / "adapter" / name, fields)
    upgrade(tmp_path / "adapter", in_place=True)
    assert json.loads(file.read_text())["my_robot"] == mine["my_robot"]
    fields = json.loads((tmp_path / "adapter" / "preprocessor_config.json").read_text())
    assert fields["auto_map"]["AutoProcessor"] == "processing_openvla.OpenVLAProcessor"
    assert "my_robot" in OpenVLAForActionPrediction.from_pretrained(tmp_path / "adapter").norm_stats


def test_the_user_s_code_is_kept(saved, tmp_path):
    """Also where a configuration names it: a tokenizer's class, a model class."""
    (saved / "my_tokenizer.py").write_text("mine")
    (saved / "my_model.py").write_text("mine")
    for name, reference in (("config.json", "my_model.M"), ("tokenizer_config.json", [None, "my_tokenizer.T"])):
        fields = json.loads((saved / name).read_text())
        fields["auto_map"] = {"AutoModel" if name == "config.json" else "AutoTokenizer": reference}
        write_json(saved / name, fields)
    dropped = dropped_code(saved)
    assert upgrade(saved, in_place=True) == dropped
    assert (saved / "my_tokenizer.py").read_text() == (saved / "my_model.py").read_text() == "mine"


def test_a_model_without_a_processor_is_upgraded(tiny, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tiny.model.save_pretrained(tmp_path / "model")
    upgrade(tmp_path / "model", in_place=True)
    assert "added README.md, openvla_manifest.json" in caplog.text
    assert not (tmp_path / "model" / "preprocessor_config.json").exists()
    AutoModelForVision2Seq.from_pretrained(tmp_path / "model")


def test_links_and_modes_are_kept_in_place(saved, tmp_path):
    (tmp_path / "dataset").mkdir()
    (saved / "data").symlink_to("../dataset")
    (saved / "gone").symlink_to("nowhere")
    (saved / "logs").mkdir()
    (saved / "logs" / "self").symlink_to(".")
    os.chmod(saved, 0o700)
    os.chmod(saved / "config.json", 0o600)
    upgrade(saved, tmp_path / "new")
    assert (tmp_path / "new" / "data").resolve() == tmp_path / "dataset"
    upgrade(saved, in_place=True)
    assert os.readlink(saved / "data") == "../dataset"
    assert os.readlink(saved / "gone") == "nowhere"
    assert os.readlink(saved / "logs" / "self") == "."
    assert (saved.stat().st_mode & 0o777, (saved / "config.json").stat().st_mode & 0o777) == (0o700, 0o600)


def test_the_backup_of_a_killed_upgrade_is_restored_first(saved, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    saved.rename(tmp_path / f".saved.{platform.node()}.{ended.pid}.previous")
    upgrade(saved, in_place=True)
    assert verify(saved)


def test_a_target_inside_or_around_the_source_is_refused(saved, tmp_path):
    before = contents(tmp_path)
    for out in (saved, saved / "out", tmp_path):
        with pytest.raises(ValueError, match="must lie beside"):
            upgrade(saved, out, overwrite=True)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="no saved folder"):
        upgrade(saved, tmp_path / "precious", overwrite=True)
    shutil.rmtree(tmp_path / "precious")
    assert contents(tmp_path) == before
    upgrade(saved, tmp_path / "out")
    with pytest.raises(FileExistsError, match="give another name"):
        upgrade(saved, tmp_path / "out")
    upgrade(saved, tmp_path / "out", overwrite=True)


def is_current(code: bytes) -> bool:
    """Return whether this is today's modeling_openvla.py, with the digest that every saved file carries."""
    today = (REPOSITORY / "modeling_openvla.py").read_text()
    return re.sub(r'; CODE_DIGEST = "[0-9a-f]{64}"', "", code.decode(), count=1) == today


def test_quantised_weights_are_upgraded(saved, tmp_path, frames):
    pytest.importorskip("bitsandbytes")
    if not QUANTIZES_ON_CPU:
        pytest.skip("needs a GPU before transformers 4.53")
    model = OpenVLAForActionPrediction.from_pretrained(saved, quantization_config=quantization_config(4)).eval()
    model.save_pretrained(tmp_path / "quantised")
    AutoProcessor.from_pretrained(saved).save_pretrained(tmp_path / "quantised")
    upgrade(tmp_path / "quantised", tmp_path / "new")
    again = AutoModelForVision2Seq.from_pretrained(tmp_path / "new").eval()
    inputs = AutoProcessor.from_pretrained(tmp_path / "new")(instruction="open the drawer", images=frames["noise"])
    actions = [m.predict_action(**inputs, constrain_actions=True) for m in (model, again)]
    assert np.array_equal(*actions)


def test_the_installed_package_is_preferred_to_a_folder_s_broken_code(saved, tiny):
    for path in saved.glob("*_openvla.py"):
        path.write_text("raise RuntimeError('broken')")
    expected = predict(tiny.model, tiny.processor)
    for trust in ({}, {"trust_remote_code": True}):
        model = AutoModelForVision2Seq.from_pretrained(saved, **trust).eval()
        assert predict(model, AutoProcessor.from_pretrained(saved, **trust)) == expected
    auto_class = getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
    processor = transformers.AutoProcessor.from_pretrained(saved)
    assert predict(auto_class.from_pretrained(saved).eval(), processor) == expected


def no_config(folder):
    (folder / "config.json").unlink()


def foreign(folder):
    write_json(folder / "config.json", {"model_type": "bert"})


def damaged_json(folder):
    (folder / "config.json").write_text('{"model_type": ')


def half_written(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def temporary_file(folder):
    (folder / ".config.json.1234.tmp").write_text("{")


def a_download(folder):
    (folder / "model.safetensors.incomplete").write_bytes(b"12")


def oft_parts(folder):
    torch.save({}, folder / "action_head--150000_checkpoint.pt")


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def other_weights(folder):
    upgrade(folder, in_place=True)
    model, _ = build_tiny(seed=1)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_config, "has no config.json"),
        (foreign, "nor that of a model of type"),
        (damaged_json, "is not JSON"),
        (half_written, "model.safetensors"),
        (temporary_file, r"is being written \(.config.json.1234.tmp\); nothing was changed"),
        (a_download, "is being written"),
        (oft_parts, "OpenVLA-OFT's part files .*openvla convert"),
        (pickled, "pytorch_model.bin.*openvla convert"),
        (no_weights, "holds neither"),
        (other_weights, "delete openvla_manifest.json"),
    ],
)
@pytest.mark.parametrize("in_place", [False, True], ids=["out", "in place"])
def test_bad_input_changes_nothing(change, message, in_place, saved, tmp_path):
    change(saved)
    before, siblings = contents(saved), sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        upgrade(saved, None if in_place else tmp_path / "new", in_place=in_place)
    assert contents(saved) == before
    assert sorted(tmp_path.iterdir()) == siblings


def test_a_folder_that_another_process_writes_is_refused(saved, tmp_path, monkeypatch):
    write = module._write_upgraded

    def while_somebody_writes(source, folder, name):
        write(source, folder, name)
        (source / "config.json").write_text((source / "config.json").read_text() + " ")

    monkeypatch.setattr(module, "_write_upgraded", while_somebody_writes)
    with pytest.raises(ValueError, match=r"is being written \(config.json\)"):
        upgrade(saved, in_place=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "weights"]


def test_a_full_disk_changes_nothing(saved, tmp_path, monkeypatch):
    before = contents(saved)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "link_or_copy", full)
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="No space left on the disk of .*; nothing was changed"):
        upgrade(saved, in_place=True)
    assert contents(saved) == {**before, "notes.txt": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "weights"]


@pytest.mark.slow
def test_a_small_file_system_changes_nothing(saved, small_disk):
    with pytest.raises(OSError, match="No space left on the disk of"):
        upgrade(saved, small_disk / "new")
    assert list(small_disk.iterdir()) == []


def test_contradicting_arguments_are_refused(saved, tmp_path, capsys):
    for arguments, message in (
        ([str(saved)], "needs OUT"),
        ([str(saved), str(tmp_path / "new"), "--in-place"], "needs OUT"),
        ([str(saved), str(tmp_path / "weights")], "exists; give another name"),
        ([str(saved / "config.json"), str(tmp_path / "new")], "is a file"),
        (["me/robot", str(tmp_path / "new"), "--create-pr", "--revision", "v1"], "takes none"),
        (["me/robot", str(tmp_path / "new"), "--publish", "--revision", "0" * 40], "needs a branch"),
        (["nobody/nothing", "--in-place"], "--in-place is for a folder"),
        ([str(saved), str(tmp_path / "new"), "--publish"], "need a Hub id"),
        ([str(native_run("fused", tmp_path / "run")), str(tmp_path / "new")], "native run; make a folder of it"),
    ):
        assert main(["upgrade", *arguments]) == 2, arguments
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--publish", "--create-pr"])
def test_a_repository_on_the_hub_is_upgraded_and_published(option, here, tmp_path, capsys):
    repo = f"me/old{option.strip('-')}"
    source = published_folder("fused", tmp_path / "old", pad_token_id=build_tokenizer().pad_token_id)
    (source / "modeling_prismatic.py").write_text("import timm_of_long_ago\n")
    (source / "README.md").write_text("---\nlicense: mit\n---\nmy card\n")
    here.branches[repo] = {"main": [contents(source)]}
    sent = len(here.requests)
    assert main(["upgrade", repo, str(tmp_path / "new"), option]) == 0
    assert ("/discussions/" if option == "--create-pr" else "/commit/") in capsys.readouterr().out
    head = here.files(repo, "refs/pr/1" if option == "--create-pr" else "main")
    assert "modeling_prismatic.py" not in head
    assert is_current(head["modeling_openvla.py"])
    assert head["README.md"] == (source / "README.md").read_bytes()
    assert head["model.safetensors"] == (source / "model.safetensors").read_bytes()
    assert here.files(repo) == (contents(source) if option == "--create-pr" else head)
    assert [request for request in here.requests[sent:] if request.startswith("POST")]
