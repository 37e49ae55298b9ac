"""Conversion of checkpoints on the Hub, served by a Hub on loopback."""

import json

import pytest
from hub import OWNER, TOKEN, upload_folder
from openvla.__main__ import main
from openvla.conversion.verify import verify
from openvla.convert_checkpoint import convert
from openvla.tiny import build_tokenizer
from reference import GOLDEN, digests, native_run, published_folder, write_json
from safetensors.torch import load_file

pytestmark = pytest.mark.lane


def expected(name):
    return json.loads((GOLDEN / f"native_{name}" / "expected.json").read_text())["hf_sha256"]


def weights_fetched(hub):
    return {r.rsplit("/", 1)[1] for r in hub.requests if r.startswith("GET") and r.endswith((".pt", ".safetensors"))}


def test_a_native_run_on_the_hub_is_converted(here, tmp_path, overrides, tokenizer, capsys):
    run = native_run("siglip", tmp_path / "run")
    (run / "checkpoints" / "step-000001-epoch-00-loss=9.pt").write_bytes(b"not wanted")
    upload_folder(here, "me/native", run)
    here.requests.clear()
    here.cut_after = 12_000_000  # the connection breaks once; the download goes on where it stopped
    write_json(tmp_path / "sizes.json", overrides["siglip"])
    arguments = ["--tokenizer", str(tokenizer), "--config-overrides", str(tmp_path / "sizes.json"), "--dtype", "fp32"]
    command = ["convert", "me/native", str(tmp_path / "hub"), *arguments]
    if main(command):  # huggingface_hub before 1.0 does not try again by itself
        assert "run it again and it goes on" in capsys.readouterr().err
        assert main(command) == 0
    assert here.resumed == ["checkpoints/latest-checkpoint.pt"]
    assert capsys.readouterr().out.splitlines()[0] == "me/native: native run"
    assert digests(load_file(tmp_path / "hub" / "model.safetensors")) == expected("siglip")
    assert weights_fetched(here) == {"latest-checkpoint.pt"}
    assert (tmp_path / "hub" / "README.md").read_text().count("# hub") == 1
    here.requests.clear()
    convert("me/native", tmp_path / "again", tokenizer=tokenizer, config_overrides=overrides["siglip"])
    assert not weights_fetched(here)  # it is in the cache


def test_a_folder_inside_a_repository_is_converted(here, tmp_path, overrides, tokenizer):
    upload_folder(here, "me/many", native_run("siglip", tmp_path / "run"), "prism/siglip+7b/")
    arguments = {"tokenizer": tokenizer, "config_overrides": overrides["siglip"]}
    convert("me/many/prism/siglip+7b", tmp_path / "hub", **arguments)
    assert verify(tmp_path / "hub") == len(expected("siglip"))
    with pytest.raises(FileNotFoundError, match="no folder 'other'"):
        convert("me/many/other", tmp_path / "other", **arguments)


def test_a_private_repository_at_a_revision_is_converted(here, tmp_path, monkeypatch):
    source = published_folder("fused", tmp_path / "old", pad_token_id=build_tokenizer().pad_token_id)
    (source / "pytorch_model.bin").write_bytes(b"not wanted")
    upload_folder(here, "me/finetune", source)
    here.branches["me/finetune"]["v1"] = list(here.branches["me/finetune"]["main"])
    here.branches["me/finetune"]["main"].append({"README.md": b"moved on"})
    here.private.add("me/finetune")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(FileNotFoundError, match="for a private or gated one pass --token"):
        convert("me/finetune", tmp_path / "new", revision="v1")
    with pytest.raises(FileNotFoundError, match="no revision 'v2'"):
        convert("me/finetune", tmp_path / "new", revision="v2", token=TOKEN)
    here.requests.clear()
    convert("me/finetune", tmp_path / "new", revision="v1", token=TOKEN)
    assert not [request for request in here.requests if request.endswith(".bin")]
    assert digests(load_file(tmp_path / "new" / "model.safetensors")) == digests(
        load_file(source / "model.safetensors")
    )
    (source / "model.safetensors").write_bytes(b"")
    assert verify(tmp_path / "new")


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("no such folder", None, "that is no Hub id"),
        (f"{OWNER}/nothing", None, "no repository me/nothing on the Hub that this token may read"),
        (".", "v1", "--revision goes with a Hub id"),
    ],
)
def test_a_missing_source_is_named(source, revision, message, here, tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        convert(source, tmp_path / "new", revision=revision)
