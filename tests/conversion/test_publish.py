"""Publishing to a Hub on loopback, and loading from there by repository id."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub import TOKEN
from huggingface_hub import ModelCard, constants, snapshot_download
from openvla import OpenVLAForActionPrediction, OpenVLAProcessor, quantization_config
from openvla.__main__ import main
from openvla.compatibility_openvla import QUANTIZES_ON_CPU
from openvla.conversion.hub_upload import publishable, push_folder
from openvla.convert_checkpoint import convert
from openvla.tiny import build_tokenizer
from reference import REPOSITORY, published_folder

pytestmark = pytest.mark.lane

PUSH = """
import json, sys
from exchange import predict
from openvla import AutoModelForVision2Seq, AutoProcessor
from openvla.tiny import build_tiny

model, processor = build_tiny()
model.add_norm_stats("my_robot", {"q01": [-0.1] * 7, "q99": [0.1] * 7, "mask": [True] * 6 + [False]})
model.config.default_unnorm_key = "untrained"
expected = predict(model, processor)
model.push_to_hub("me/robot", private=True, tags=["my-tag"], max_shard_size="1MB")
processor.push_to_hub("me/robot")
again, reader = AutoModelForVision2Seq.from_pretrained("me/robot").eval(), AutoProcessor.from_pretrained("me/robot")
assert predict(again, reader) == expected
assert set(again.norm_stats) == {"untrained", "my_robot"}
print(json.dumps(expected))
"""

LOAD = """
import json, sys
sys.modules["openvla"] = None
import transformers
from exchange import predict

processor = transformers.AutoProcessor.from_pretrained("me/robot", trust_remote_code=True)
model_class = getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
model = model_class.from_pretrained("me/robot", trust_remote_code=True).eval()
actions = predict(model, processor)
model.push_to_hub("me/copy")
processor.push_to_hub("me/copy")
print(json.dumps(actions))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A complete folder, as openvla convert leaves it."""
    where = tmp_path_factory.mktemp("publish")
    source = published_folder("fused", where / "old", pad_token_id=build_tokenizer().pad_token_id)
    convert(source, where / "new")
    return where / "new"


def in_fresh_process(script, hub, cache, cwd):
    environment = {**os.environ, **hub.environment(cache), "PYTHONPATH": str(REPOSITORY / "tests")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_pushed_from_a_notebook_and_loaded_by_id(hub, tmp_path):
    expected = in_fresh_process(PUSH, hub, tmp_path / "first", tmp_path)
    files = hub.files("me/robot")
    assert {path.name for path in REPOSITORY.glob("*_openvla.py")} <= set(files)
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    assert {"dataset_statistics.json", "generation_config.json", "preprocessor_config.json"} <= set(files)
    assert {"processor_config.json", "tokenizer.json"} <= set(files)
    card = files["README.md"].decode()
    assert "## Actions of `my_robot`" in card
    assert "- my-tag" in card
    assert "me/robot" in hub.private
    fetched = len(hub.requests)
    assert in_fresh_process(LOAD, hub, tmp_path / "second", tmp_path) == expected
    code = {request.rsplit("/", 1)[1] for request in hub.requests[fetched:] if request.endswith("_openvla.py")}
    assert {"modeling_openvla.py", "prismatic_openvla.py", "publishing_openvla.py", "images_openvla.py"} <= code
    copy = hub.files("me/copy")  # pushed by the remote code itself
    weights = {name for name in {*files, *copy} if "safetensors" in name}
    assert set(copy) - weights == set(files) - weights
    assert {name: copy[name] for name in copy if name.endswith(".py")} == {
        name: files[name] for name in files if name.endswith(".py")
    }
    for name in ("config.json", "dataset_statistics.json", "preprocessor_config.json", "processor_config.json"):
        first, second = json.loads(files[name]), json.loads(copy[name])
        assert {**first, "_name_or_path": ""} == {**second, "_name_or_path": ""}, name


def test_the_command_uploads_every_file(here, folder, capsys):
    assert main(["publish", str(folder), "me/published"]) == 0
    files = here.files("me/published")
    assert set(files) == {".gitattributes", *publishable(folder)}
    assert {name: files[name] for name in publishable(folder)} == {
        name: path.read_bytes() for name, path in publishable(folder).items()
    }
    assert "/commit/" in capsys.readouterr().out
    sent = [request for request in here.requests if request.startswith("PUT")]
    assert main(["publish", str(folder), "me/published", "--branch", "v2"]) == 0
    assert [request for request in here.requests if request.startswith("PUT")] == sent  # weights are there already
    assert set(here.branches["me/published"]) == {"main", "v2"}
    assert main(["publish", str(folder), "me/published", "--create-pr"]) == 0
    assert "/discussions/" in capsys.readouterr().out
    assert len(here.branches["me/published"]["main"]) == 2


def test_an_adapter_is_uploaded(here, folder, tmp_path, capsys):
    pytest.importorskip("peft")
    model = OpenVLAForActionPrediction.from_pretrained(folder)
    model.enable_lora(r=2, targets="language")
    model.save_pretrained(tmp_path / "adapter")
    assert main(["publish", str(tmp_path / "adapter"), "me/adapter"]) == 0
    files = here.files("me/adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "openvla_adapter.json", "README.md"} <= set(files)
    assert "modeling_openvla.py" in files
    model.push_to_hub("me/adapter-too")
    assert set(here.files("me/adapter-too")) == set(files)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert main(["publish", str(tmp_path / "adapter"), "me/damaged"]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err
    assert "me/damaged" not in here.branches


def test_quantised_weights_are_uploaded(here, folder, tmp_path, frames):
    pytest.importorskip("bitsandbytes")
    if not QUANTIZES_ON_CPU:
        pytest.skip("this transformers version quantises on a GPU only")
    model = OpenVLAForActionPrediction.from_pretrained(folder, quantization_config=quantization_config(4)).eval()
    processor = OpenVLAProcessor.from_pretrained(folder)
    inputs = processor(instruction="pick up the red block", images=frames["noise"])
    expected = model.predict_action(**inputs, unnorm_key="bridge_orig", return_dict=True)
    model.save_pretrained(tmp_path / "small")
    processor.save_pretrained(tmp_path / "small")
    assert main(["publish", str(tmp_path / "small"), "me/small"]) == 0
    fetched = snapshot_download("me/small", cache_dir=tmp_path / "cache", endpoint=here.url)
    again = OpenVLAForActionPrediction.from_pretrained(fetched).eval()
    found = again.predict_action(**inputs, unnorm_key="bridge_orig", return_dict=True)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    before, after = model.state_dict(), again.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_dry_run_uses_no_network(here, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "folder")
    (tmp_path / "folder" / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "folder" / ".cache").mkdir()
    (tmp_path / "folder" / ".cache" / "x").write_text("")
    (tmp_path / "folder" / "README.md").unlink()
    before = len(here.requests)
    assert main(["publish", str(tmp_path / "folder"), "me/never", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "model.safetensors" in out
    assert "README.md (written where the repository has none)" in out
    assert "['.cache/x', 'optimizer.pt']" in out
    assert len(here.requests) == before
    assert "me/never" not in here.branches


def test_a_card_on_the_hub_is_kept(here, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "folder")
    (tmp_path / "folder" / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    assert main(["publish", str(tmp_path / "folder"), "me/card", "--private"]) == 0
    assert "me/card" in here.private
    (tmp_path / "folder" / "README.md").unlink()
    assert main(["publish", str(tmp_path / "folder"), "me/card"]) == 0
    assert here.files("me/card")["README.md"].endswith(b"My own words.\n")


def test_tags_are_added_to_an_existing_card(here, folder, tiny, tmp_path):
    shutil.copytree(folder, tmp_path / "folder")
    (tmp_path / "folder" / "README.md").write_text("---\nlicense: mit\ntags: [old]\n---\nMy own words.\n")
    assert main(["publish", str(tmp_path / "folder"), "me/tagged"]) == 0
    for _ in range(2):
        tiny.processor.push_to_hub("me/tagged", tags=["new", "old"])
    card = ModelCard(here.files("me/tagged")["README.md"].decode())
    assert card.data.tags == ["old", "new"]
    assert card.data.license == "mit"
    assert card.text.strip() == "My own words."
    with pytest.raises(ValueError, match="tags go into a model's card, and me/empty has none; push the model first"):
        tiny.processor.push_to_hub("me/empty", tags=["new"])


def test_an_existing_repository_keeps_its_visibility(here, tiny):
    tiny.processor.push_to_hub("me/open", private=False)
    commits = len(here.branches["me/open"]["main"])
    with pytest.raises(ValueError, match="me/open exists and is public; private=True is for a new repository. .*leave"):
        tiny.processor.push_to_hub("me/open", private=True)
    assert len(here.branches["me/open"]["main"]) == commits
    tiny.processor.push_to_hub("me/shut", private=True)
    tiny.processor.push_to_hub("me/shut", private=True)
    assert "me/shut" in here.private


def test_a_repository_never_holds_an_adapter_and_whole_weights(here, tiny, tmp_path):
    tiny.model.push_to_hub("me/whole")
    commits = len(here.branches["me/whole"]["main"])
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match="me/whole holds model.* a repository or a branch each. .*Nothing was uploaded"
    ):
        push_folder(tmp_path, "me/whole")
    assert len(here.branches["me/whole"]["main"]) == commits
    push_folder(tmp_path, "me/adapter")
    with pytest.raises(ValueError, match="me/adapter holds adapter_config.json"):
        tiny.model.push_to_hub("me/adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("processor", "preprocessor_config.json', 'a tokenizer'"),
        ("code", "images_openvla.py"),
        ("old code", "openvla upgrade"),
        ("statistics", "no action statistics"),
        ("weights", "does not fit its configuration"),
        ("changed", "is not what was written"),
        ("type", "model of type 'bert'"),
        ("nothing", "has no config.json"),
    ],
)
def test_an_incomplete_folder_is_not_uploaded(change, message, here, folder, tmp_path, capsys):
    target = tmp_path / "folder"
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    if change == "processor":
        for name in ("preprocessor_config.json", "tokenizer.json"):
            (target / name).unlink()
    elif change == "code":
        (target / "images_openvla.py").unlink()
    elif change == "old code":
        config["auto_map"] = {"AutoConfig": "configuration_prismatic.OpenVLAConfig"}
    elif change == "statistics":
        config["norm_stats"] = None
    elif change == "weights":
        config["text_config"]["num_hidden_layers"] += 1
    elif change == "changed":
        (target / "generation_config.json").write_text("{}")
    elif change == "type":
        config["model_type"] = "bert"
    else:
        (target / "config.json").unlink()
    if change in ("old code", "statistics", "weights", "type"):
        (target / "config.json").write_text(json.dumps(config))
    before = len(here.requests)
    assert main(["publish", str(target), "me/refused"]) == 2
    assert message in capsys.readouterr().err
    assert len(here.requests) == before


def test_a_wrong_token_is_reported_in_one_line(here, folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert main(["publish", str(folder), "me/refused"]) == 2
    error = capsys.readouterr().err
    assert "401" in error
    assert "Traceback" not in error
    assert main(["publish", str(folder), "me/refused", "--token", TOKEN]) == 0


def test_an_unreachable_hub_is_reported_in_one_line(here, folder, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["publish", str(folder), "me/refused"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_no_pickle_is_uploaded(tiny):
    with pytest.raises(ValueError, match="safe_serialization=False"):
        tiny.model.push_to_hub("me/robot", safe_serialization=False)
