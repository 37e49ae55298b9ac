"""A saved folder has one meaning: one set of weights, and code files that were saved together."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from openvla import OpenVLAForActionPrediction
from openvla.compatibility_openvla import TRANSFORMERS_VERSION
from openvla.conversion.hub_upload import publishable
from openvla.conversion.hub_weights import weight_files
from openvla.conversion.publish import require_complete
from openvla.conversion.safetensors_io import read_tensors
from openvla.conversion.upgrade import upgrade
from openvla.convert_checkpoint import convert
from openvla.saved_folder import INDEX_FILE, SINGLE_FILE, warn_of_two_sets
from openvla.tiny import build_tiny
from reference import REPOSITORY

pytestmark = pytest.mark.lane

SHARDED = {"max_shard_size": "1MB"}
MARKED = re.compile(r'^from __future__ import annotations; CODE_DIGEST = "([0-9a-f]{64})"$', re.MULTILINE)


def scaled(scale: float):
    """Return a model whose head has this scale, and the processor."""
    model, processor = build_tiny()
    with torch.no_grad():
        model.language_model.lm_head.weight.fill_(scale)
    return model, processor


def head_of(folder) -> float:
    model = OpenVLAForActionPrediction.from_pretrained(folder)
    return model.language_model.lm_head.weight[0, 0].item()


@pytest.mark.parametrize(("first", "second"), [({}, SHARDED), (SHARDED, {}), (SHARDED, SHARDED), ({}, {})])
def test_a_second_save_replaces_weights_of_another_layout(first, second, tmp_path):
    scaled(1.0)[0].save_pretrained(tmp_path / "model", **first)
    model, processor = scaled(2.0)
    model.save_pretrained(tmp_path / "model", **second)
    processor.save_pretrained(tmp_path / "model")
    assert head_of(tmp_path / "model") == 2.0
    assert dict(read_tensors(weight_files(tmp_path / "model")))["language_model.lm_head.weight"][0, 0] == 2.0
    weights = {
        path.name
        for path in (tmp_path / "model").iterdir()
        if path.name.startswith("model.") or ".safetensors" in path.name
    }
    assert ({SINGLE_FILE} <= weights) == (not second)
    assert ({INDEX_FILE} <= weights) == bool(second)
    if not second:
        assert weights == {SINGLE_FILE}
    require_complete(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "converted")
    assert head_of(tmp_path / "converted") == 2.0


@pytest.mark.skipif(TRANSFORMERS_VERSION >= (5, 0), reason="transformers 5 writes safetensors whatever is asked")
@pytest.mark.parametrize("second", [{}, SHARDED])
@pytest.mark.parametrize("first", [{}, SHARDED])
def test_a_pickle_saved_last_is_what_loads(first, second, tmp_path):
    scaled(1.0)[0].save_pretrained(tmp_path, **first)
    scaled(2.0)[0].save_pretrained(tmp_path, safe_serialization=False, **second)
    assert head_of(tmp_path) == 2.0
    assert not [path.name for path in tmp_path.iterdir() if ".safetensors" in path.name]


@pytest.mark.parametrize(("first", "second"), [({}, SHARDED), (SHARDED, {})])
def test_a_second_save_of_a_variant_replaces_only_that_variant(first, second, tmp_path):
    scaled(3.0)[0].save_pretrained(tmp_path)
    scaled(1.0)[0].save_pretrained(tmp_path, variant="fp16", **first)
    scaled(2.0)[0].save_pretrained(tmp_path, variant="fp16", **second)
    model = OpenVLAForActionPrediction.from_pretrained(tmp_path, variant="fp16")
    assert model.language_model.lm_head.weight[0, 0] == 2.0
    assert head_of(tmp_path) == 3.0


@pytest.fixture(scope="module")
def adapter_and_base(tmp_path_factory):
    """An adapter's folder and its base's."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("kinds")
    scaled(1.0)[0].save_pretrained(folder / "base")
    model = OpenVLAForActionPrediction.from_pretrained(folder / "base")
    model.enable_lora(2, targets="language")
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", folder / "base"


def test_whole_weights_are_not_saved_beside_an_adapter(adapter_and_base):
    adapter, _ = adapter_and_base
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    with pytest.raises(ValueError, match="holds an adapter .* Give another folder"):
        scaled(2.0)[0].save_pretrained(adapter)
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_an_adapter_is_not_saved_beside_whole_weights(adapter_and_base):
    adapter, base = adapter_and_base
    model = OpenVLAForActionPrediction.from_pretrained(adapter)
    for save in (model.save_pretrained, model.save_lora):
        with pytest.raises(ValueError, match="holds whole weights .* Give another folder"):
            save(base)
    assert head_of(base) == 1.0
    model.save_pretrained(adapter)  # the same kind, again


def test_a_folder_of_both_kinds_is_refused(adapter_and_base, tmp_path):
    adapter, base = adapter_and_base
    shutil.copytree(base, tmp_path / "both")
    shutil.copytree(adapter, tmp_path / "both", dirs_exist_ok=True)
    for read in (
        OpenVLAForActionPrediction.from_pretrained,
        require_complete,
        lambda folder: convert(folder, tmp_path / "converted"),
        lambda folder: upgrade(folder, tmp_path / "upgraded"),
    ):
        with pytest.raises(ValueError, match="holds an adapter .* and whole weights"):
            read(tmp_path / "both")


def test_statistics_with_other_numbers_are_replaced_with_a_warning_and_kept(tmp_path, monkeypatch):
    from openvla import saved_folder

    messages = []
    monkeypatch.setattr(saved_folder.logger, "warning", messages.append)
    model, _ = build_tiny()
    file = tmp_path / "dataset_statistics.json"
    in_file = json.loads(json.dumps(model.norm_stats))
    in_file["untrained"]["num_transitions"] = 7  # moves no robot
    file.write_text(json.dumps(in_file))
    model.save_pretrained(tmp_path)
    assert not messages
    in_file["untrained"]["action"]["q99"][0] = 9.0
    file.write_text(json.dumps(in_file))
    model.save_pretrained(tmp_path)
    assert "had other numbers than this model for ['untrained']" in messages[0]
    assert json.loads(file.read_text())["untrained"]["action"]["q99"][0] == 1.0
    assert json.loads((tmp_path / "dataset_statistics.replaced.json").read_text()) == in_file
    loaded = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    loaded.add_norm_stats("untrained", in_file["untrained"])
    loaded.save_pretrained(tmp_path)  # a correction of its own folder
    assert len(messages) == 1
    assert json.loads(file.read_text())["untrained"]["action"]["q99"][0] == 9.0


@pytest.fixture(scope="module", params=["shards", "index alone"])
def two_sets(request, tmp_path_factory):
    """A folder in which somebody else left an index, with or without its shards, beside model.safetensors."""
    folder = tmp_path_factory.mktemp("sets") / "model"
    model, processor = scaled(1.0)
    model.save_pretrained(folder, **SHARDED)
    processor.save_pretrained(folder)
    scaled(2.0)[0].save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other" / SINGLE_FILE, folder / SINGLE_FILE)
    if request.param == "index alone":
        for shard in folder.glob("model-*.safetensors"):
            shard.unlink()
    return folder


def test_of_two_sets_of_weights_everything_reads_the_one_that_transformers_loads(two_sets, tmp_path):
    assert head_of(two_sets) == 2.0
    convert(two_sets, tmp_path / "converted")
    assert head_of(tmp_path / "converted") == 2.0
    require_complete(two_sets)
    assert [name for name in publishable(two_sets) if "safetensors" in name] == [SINGLE_FILE]


def test_two_sets_are_warned_of(two_sets, monkeypatch):
    from openvla import saved_folder

    messages = []
    monkeypatch.setattr(saved_folder.logger, "warning_once", messages.append)
    warn_of_two_sets(two_sets)
    OpenVLAForActionPrediction.from_pretrained(two_sets)
    assert len(messages) == 2
    assert "if the shards are the newer weights, delete it" in messages[0]


def marks(folder) -> set[str]:
    digests_by_file = {path.name: MARKED.findall(path.read_text()) for path in folder.glob("*_openvla.py")}
    assert all(len(digests) == 1 for digests in digests_by_file.values()), digests_by_file
    return {digests[0] for digests in digests_by_file.values()}


def test_all_code_of_a_folder_carries_one_digest(tmp_path):
    model, processor = build_tiny()
    model.save_pretrained(tmp_path / "model")
    assert len(marks(tmp_path / "model")) == 1
    processor.save_pretrained(tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").glob("*.py")}
    assert names == {path.name for path in REPOSITORY.glob("*_openvla.py")}
    convert(tmp_path / "model", tmp_path / "converted")
    processor.image_processor.save_pretrained(tmp_path / "images")
    one = marks(tmp_path / "model")
    assert len(one) == 1
    assert marks(tmp_path / "converted") == marks(tmp_path / "images") == one
    for path in (tmp_path / "model").glob("*_openvla.py"):
        unmarked = MARKED.sub("from __future__ import annotations", path.read_text())
        assert unmarked == (REPOSITORY / path.name).read_text()


def test_a_users_own_code_stays_as_it_is(tmp_path):
    (tmp_path / "eval_openvla.py").write_text("from __future__ import annotations\n")
    build_tiny()[0].save_pretrained(tmp_path)
    assert (tmp_path / "eval_openvla.py").read_text() == "from __future__ import annotations\n"


def test_two_versions_in_one_folder_are_warned_of_and_refused(tmp_path, monkeypatch):
    from openvla import publishing_openvla
    from openvla.conversion.upgrade import upgrade

    messages = []
    monkeypatch.setattr(publishing_openvla.logger, "warning_once", messages.append)
    model, processor = build_tiny()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for path in folder.glob("*_openvla.py"):  # as another version of the package would have saved it
        path.write_text(re.sub('CODE_DIGEST = ".{64}"', f'CODE_DIGEST = "{"2" * 64}"', path.read_text()))
    assert not messages
    processor.save_pretrained(folder)
    assert len(set(messages)) == 1
    assert "heads_openvla.py" in messages[0]
    assert "modeling_openvla.py" in messages[0]
    assert "processing_openvla.py" not in messages[0]
    (refused,) = load_bare(tmp_path, folder)
    assert "openvla upgrade FOLDER --in-place" in refused
    upgrade(folder, in_place=True)
    assert load_bare(tmp_path, folder) == [[1, 1]]


LOAD_BOTH = """
import json, sys
sys.modules["openvla"] = None
import transformers
model_class = getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
results = []
for folder in sys.argv[1:]:
    try:
        model = model_class.from_pretrained(folder, trust_remote_code=True)
        package = type(model).__module__.rpartition(".")[0]
        helpers = [sys.modules[f"{package}.{name}_openvla"] for name in ("actions", "heads")]
        results.append([getattr(helper, "VERSION", 1) for helper in helpers])
    except ImportError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def load_bare(tmp_path, *folders):
    """Load folders in one process without the package; return for each the versions of two helpers, or the error."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", LOAD_BOTH, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("changed", ["actions", "heads"])
def test_code_of_folders_with_the_same_name_is_never_mixed(changed, tmp_path):
    model, _ = build_tiny()
    first, second = tmp_path / "one" / "model", tmp_path / "two" / "model"
    for folder in (first, second):
        model.save_pretrained(folder)
    # As a later version of the package would save it.
    helper = second / f"{changed}_openvla.py"
    helper.write_text(helper.read_text() + "\nVERSION = 2\n")
    for path in second.glob("*_openvla.py"):
        path.write_text(re.sub('CODE_DIGEST = ".{64}"', f'CODE_DIGEST = "{"2" * 64}"', path.read_text()))
    own, other = load_bare(tmp_path, first, second)
    assert own == [1, 1]
    if isinstance(other, str):
        assert TRANSFORMERS_VERSION < (5, 23)  # 4.40.1 to 5.5.4 file the code of both folders under one name
        assert "were not saved with" in other
        assert "rename it" in other
    else:
        assert other == [2 if changed == name else 1 for name in ("actions", "heads")]
