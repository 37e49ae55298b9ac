"""Findings in statistics, in ``openvla inspect-data`` and before ``openvla finetune`` trains."""

import json

import numpy as np
import pytest
from openvla.__main__ import main
from openvla.actions_openvla import NormalizationStatistics
from openvla.data.doctor import CHECKS, CheckInput, Finding, check_statistics, raise_for_findings
from openvla.data.open import open_dataset
from openvla.data.statistics import compute_statistics, statistics_and_findings
from openvla.training.config import FinetuneConfig
from reference import FIXTURES, REPOSITORY
from synthetic_arm import STEPS, arm, arm_reader, with_gripper


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENVLA_CACHE", str(tmp_path / "cache"))


# q01 and q99 (and min, max) of the actions as published with openvla-7b and OpenVLA-OFT's LIBERO checkpoints.
PUBLISHED = {
    "bridge_orig": {
        "min": [-0.40075102, -0.13874775, -0.225539, -3.2010787, -1.8618113, -6.2790756, 0.0],
        "q01": [-0.02872725, -0.0417035, -0.02609386, -0.08092105, -0.092887, -0.20718276, 0.0],
        "q99": [0.02830968, 0.04085525, 0.04016159, 0.08192048, 0.07792851, 0.20382575, 1.0],
        "max": [0.41691166, 0.25864795, 0.21218234, 3.1222019, 1.8618113, 6.2804785, 1.0],
    },
    "fractal20220817_data": {
        "min": [-2.0204521, -5.4978995, -2.0316634, -1.5699179, -1.5698922, -1.5704194, 0.0],
        "q01": [-0.22453528, -0.14820013, -0.23158971, -0.35179949, -0.41930113, -0.43643461, 0.0],
        "q99": [0.17824687, 0.1493838, 0.21842355, 0.5892666, 0.35272657, 0.44796681, 1.0],
        "max": [2.9984593, 22.090528, 2.7507524, 1.5706365, 1.5321087, 1.5691522, 1.0],
    },
    "libero_spatial_no_noops": {
        "min": [-0.9375, -0.9375, -0.9375, -0.1875, -0.3675, -0.36, 0.0],
        "q01": [-0.74547321, -0.66160715, -0.9375, -0.10714286, -0.20678571, -0.18428572, 0.0],
        "q99": [0.9375, 0.87589288, 0.93214285, 0.10392857, 0.17678571, 0.14571428, 1.0],
        "max": [0.9375, 0.9375, 0.9375, 0.19714285, 0.33642858, 0.375, 1.0],
    },
    "libero_object_no_noops": {
        "min": [-0.8839286, -0.9375, -0.9375, -0.15, -0.29035714, -0.32892856, 0.0],
        "q01": [-0.53839284, -0.87589288, -0.9375, -0.06964286, -0.11678571, -0.15964286, 0.0],
        "q99": [0.84642857, 0.84375, 0.9375, 0.08142857, 0.14892857, 0.08678571, 1.0],
        "max": [0.9375, 0.89196426, 0.9375, 0.17678571, 0.35035715, 0.18107143, 1.0],
    },
    "libero_goal_no_noops": {
        "min": [-0.9375, -0.9375, -0.9375, -0.2582143, -0.375, -0.28714284, 0.0],
        "q01": [-0.87857145, -0.75535715, -0.9375, -0.15107143, -0.16392857, -0.137775, 0.0],
        "q99": [0.9375, 0.91071427, 0.9375, 0.20357142, 0.26357144, 0.375, 1.0],
        "max": [0.9375, 0.9375, 0.9375, 0.35571429, 0.375, 0.375, 1.0],
    },
    "libero_10_no_noops": {
        "min": [-0.9375, -0.9375, -0.9375, -0.23642857, -0.30535713, -0.3675, 0.0],
        "q01": [-0.63482141, -0.77410716, -0.76339287, -0.0975, -0.1482, -0.2742857, 0.0],
        "q99": [0.77142859, 0.84642857, 0.9375, 0.13928571, 0.15964286, 0.32464287, 1.0],
        "max": [0.9375, 0.9375, 0.9375, 0.3, 0.29357144, 0.375, 1.0],
    },
}


def stored_statistics():
    """Yield place, name and action statistics of every statistics file in the repository."""
    root = REPOSITORY
    files = sorted([*root.glob("assets/**/*.json"), *root.glob("tests/golden/**/*.json")])
    for file in files:
        content = json.loads(file.read_text())
        content = content.get("norm_stats") or content if isinstance(content, dict) else {}
        for name, one in content.items():
            if isinstance(one, dict) and isinstance(one.get("action"), dict) and "q01" in one["action"]:
                yield f"{file.relative_to(root)} {name}", name, one["action"]


def test_published_statistics_have_no_finding():
    statistics_files = [*stored_statistics(), *((name, name, action) for name, action in PUBLISHED.items())]
    assert len(statistics_files) > 20
    for place, name, action in statistics_files:
        assert check_statistics({name: {"action": action}})[name] == [], place
        only = {key: action[key] for key in ("q01", "q99")}
        assert check_statistics({name: {"action": only}})[name] == [], place


@pytest.mark.parametrize("name", ["toto", "ucsd_kitchen_dataset_converted_externally_to_rlds"])
def test_published_pose_datasets_are_known_by_name(name):
    low = [170.0, -160.0, -90.0, -180.0, -80.0, -90.0, 0.0]
    high = [670.0, 400.0, 500.0, 180.0, 6.0, 110.0, 1.0]
    low[2] = 200.0
    poses = {"q01": low, "q99": high}
    assert {"absolute-pose", "degrees"} <= {one.check for one in check_statistics({"mine": {"action": poses}})["mine"]}
    assert "absolute-pose" not in {one.check for one in check_statistics({name: {"action": poses}})[name]}


@pytest.mark.parametrize(
    ("change", "check", "certain"),
    [
        ({"min": {5: -6.28}, "q01": {5: -6.28}, "q99": {5: 6.28}, "max": {5: 6.28}}, "wrapped-rotation", True),
        ({"max": {3: 6.28}}, "wrapped-rotation", False),
        ({"q01": {0: 0.3, 2: 0.1}, "q99": {0: 0.6, 2: 0.3}}, "absolute-pose", False),
        ({"q99": {3: 12.0}}, "degrees", False),
        ({"q01": {6: -1.0}, "min": {6: -1.0}}, "gripper-range", True),
        ({"q99": {6: 850.0}, "max": {6: 850.0}}, "gripper-range", True),
        ({"max": {6: 2.0}}, "gripper-range", False),
        ({"q99": {6: 0.08}, "max": {6: 0.08}}, "gripper-scale", True),
        ({"q99": {6: 0.0}, "max": {6: 0.0}}, "constant-gripper", False),
    ],
)
def test_findings_from_statistics_alone(change, check, certain, tmp_path, capsys):
    action = json.loads(json.dumps(PUBLISHED["fractal20220817_data"]))
    for key, values in change.items():
        for index, value in values.items():
            action[key][index] = value
    (finding,) = check_statistics({"mine": {"action": action}})["mine"]
    assert (finding.check, finding.certain) == (check, certain)
    # and of a checkpoint's folder or file
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": action}}))
    for place in (tmp_path, tmp_path / "dataset_statistics.json"):
        assert main(["inspect-data", str(place), "--json"]) == 0
        output = json.loads(capsys.readouterr().out)["findings"]["mine"]
        assert [(one["check"], one["severity"]) for one in output] == [(check, "certain" if certain else "doubtful")]
    assert main(["inspect-data", str(tmp_path)]) == 0
    assert f"{'CERTAIN' if certain else 'DOUBTFUL'} {check}: {finding.evidence}" in capsys.readouterr().out


def test_options_of_data_are_refused_for_statistics(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"norm_stats": {"mine": {"action": PUBLISHED["bridge_orig"]}}}))
    assert main(["inspect-data", str(tmp_path)]) == 0
    assert "findings     none" not in capsys.readouterr().out  # its name is not Bridge's: the wraps are output
    assert main(["inspect-data", str(tmp_path), "--check-images"]) == 2
    assert "holds statistics, not data: the options ['check_images'] do not apply" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert main(["inspect-data", str(tmp_path / "other.json")]) == 2
    assert "has no statistics: it needs" in capsys.readouterr().err


def test_statistics_warn_and_suggested_field_fixes_training():
    actions, states = arm()
    simulated = with_gripper(actions, lambda g: 1 - 2 * g)  # -1 open, +1 closed
    with pytest.warns(UserWarning, match=r"mine: gripper-range \(certain\): gripper from -1 to 1"):
        compute_statistics(arm_reader(simulated, states), progress=False)
    statistics, findings = statistics_and_findings(
        arm_reader(simulated, states, gripper="clipped_inverted"), progress=False
    )
    assert findings == []
    assert (statistics["action"]["min"][6], statistics["action"]["max"][6]) == (0, 1)
    learnt = NormalizationStatistics(statistics["action"])
    mended = arm_reader(simulated, states, gripper="clipped_inverted")[0].actions
    assert np.array_equal(learnt.normalize(mended)[:, 6], actions[0][:, 6])


def test_gripper_beyond_one_is_normalised_with_a_warning():
    actions, _ = arm()
    actions[0][3, 6] = 1.1
    with pytest.warns(UserWarning, match=r"action\[6\] goes from 0 to 1.1, beyond \[-1, 1\]") as seen:
        statistics = compute_statistics(arm_reader(actions), progress=False)
    assert len(seen) == 1
    assert statistics["action"]["mask"] == [True] * 7
    assert compute_statistics(arm_reader(actions, gripper="clipped"), progress=False)["action"]["mask"][6] is False


def test_inspect_data_shows_findings(tmp_path, capsys, monkeypatch):
    h5py = pytest.importorskip("h5py")
    plt = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    actions, _ = arm()
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for index, action in enumerate(with_gripper(actions, lambda g: 850 * g)[:2]):
            episode = file.create_group(f"data/demo_{index}")
            episode.attrs["language_instruction"] = "go"
            episode["actions"] = action
            episode["images"] = np.random.RandomState(index).randint(0, 256, (STEPS, 16, 16, 3), np.uint8)
    for more in (["--out", str(tmp_path / "look.png")], []):  # the second time from the cache
        with pytest.warns(UserWarning, match="normalised like a movement"):
            assert main(["inspect-data", str(tmp_path), *more]) == 0
        text = capsys.readouterr().out
        assert "findings     1 certain (openvla finetune stops at them), 0 doubtful" in text
        assert "CERTAIN gripper-range: gripper from 0 to 850" in text
        assert "not checked against the state: absolute poses and shifted actions (no proprio)" in text
    (figure,) = figures
    assert figure.get_suptitle().endswith("2 episodes, 120 steps\ngripper-range (certain)")
    titles = {axes.get_title(): axes.title.get_color() for axes in figure.axes if "units" in axes.get_title()}
    assert [title for title, color in titles.items() if color == "C3"] == ["gripper (dataset units)"]
    assert main(["inspect-data", str(tmp_path), "--json", "--fields", "{gripper_range: [0, 850]}"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []


@pytest.mark.parametrize("name", ["lerobot_v3", "lerobot_v21", "bridge_orig", "fractal20220817_data", "hdf5"])
def test_fixtures_have_no_certain_finding(name):
    for package in ("av", "google_crc32c", "h5py", "pyarrow"):
        pytest.importorskip(package)
    _, findings = statistics_and_findings(open_dataset(FIXTURES / name), progress=False)
    assert not any(finding.certain for finding in findings)


CERTAIN = Finding("gripper-range", True, "gripper from 0 to 850.", "why.", "Give gripper_range.")
DOUBTFUL = Finding("idle-steps", False, "much.", "why.", "less.")


def test_certain_findings_raise_unless_accepted(recwarn):
    message = r"(?s)cannot be right.*a: gripper-range \(certain\): gripper from 0 to 850.*--accept gripper-range"
    with pytest.raises(ValueError, match=message):
        raise_for_findings({"a": [CERTAIN, DOUBTFUL]})
    with pytest.raises(ValueError, match=message):
        raise_for_findings({"a": [CERTAIN]}, ["idle-steps"])
    assert not recwarn.list
    raise_for_findings({"a": [CERTAIN, DOUBTFUL]}, ["gripper-range", "degrees"])
    assert [str(one.message) for one in recwarn.list] == [
        f"a: accepted: {CERTAIN.text()}",
        f"a: {DOUBTFUL.text()}",
        "accept: the checks ['degrees'] have no finding in this data; remove them.",
    ]
    recwarn.clear()
    raise_for_findings({"a": [DOUBTFUL]}, quiet=True)
    assert not recwarn.list


def test_accept_must_name_checks():
    given = {"model": "m", "output_dir": "o"}
    assert FinetuneConfig(**given, accept=list(CHECKS)).accept == list(CHECKS)
    with pytest.raises(ValueError, match="Unknown check 'gripper' in accept. Did you mean 'gripper-"):
        FinetuneConfig(**given, accept=["gripper"])
    with pytest.raises(ValueError, match="accept must be a list of names, got 'degrees'"):
        FinetuneConfig(**given, accept="degrees")


@pytest.fixture
def simulated(tmp_path):
    """Options of a run on a dataset with the simulator's gripper of -1 to +1."""
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("accelerate")
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for index, action in enumerate(with_gripper(arm()[0], lambda g: 1 - 2 * g)[:2]):
            episode = file.create_group(f"data/demo_{index}")
            episode.attrs["language_instruction"] = "go"
            episode["actions"] = action
            episode["images"] = np.random.RandomState(index).randint(0, 256, (STEPS, 16, 16, 3), np.uint8)
    return ["--model", str(tmp_path / "no-model"), "--output-dir", str(tmp_path / "run"), "--use-cpu"]


def test_finetune_checks_data_before_loading_the_model(simulated, tmp_path, capsys):
    run = ["finetune", "--data", str(tmp_path), *simulated]
    assert main(run) == 2
    output = capsys.readouterr().err
    assert "gripper-range (certain): gripper from -1 to 1" in output
    assert "gripper: clipped_inverted if -1 opens" in output
    assert "train anyway with --accept gripper-range" in output
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match="accepted: gripper-range") as seen:
        assert main([*run, "--accept", "gripper-range", "--accept", "degrees"]) != 0  # there is no model
    assert "The data cannot be right" not in capsys.readouterr().err
    assert any("accept: the checks ['degrees'] have no finding" in str(one.message) for one in seen)
    (tmp_path / "run.yaml").write_text("accept: [gripper-range]")
    with pytest.warns(UserWarning, match="accepted: gripper-range"):
        main(["finetune", str(tmp_path / "run.yaml"), *run[1:]])
    capsys.readouterr()


def test_finetune_checks_statistics_without_readers(tmp_path):
    pytest.importorskip("accelerate")
    from openvla.training.finetune import finetune

    class Held:
        readers = ()
        statistics = {"lab": {"action": {"q01": [-0.5] * 6 + [-1.0], "q99": [0.5] * 6 + [1.0]}}}

    with pytest.raises(ValueError, match=r"lab: gripper-range \(certain\)"):
        finetune(FinetuneConfig(model="no", output_dir=str(tmp_path / "run"), use_cpu=True), Held())


@pytest.mark.parametrize(("shift", "checks"), [(0, []), (1, ["shifted-actions"]), (-1, [])])
def test_inspect_data_compares_frames_without_state(shift, checks, tmp_path, capsys):
    h5py = pytest.importorskip("h5py")
    random, ramp = np.random.RandomState(0), np.tile(np.linspace(0, 255, 64), (32, 1))
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        for index in range(3):
            move = random.choice([0.0, 1.0, 3.0], STEPS) * random.choice([-1, 1], STEPS)
            action = np.column_stack([move / 100, random.normal(0, 1e-4, (STEPS, 5)), np.arange(STEPS) < 30])
            place = np.concatenate([[0], np.cumsum(move)[:-1]])  # frame t + 1 shows what action t did
            frames = np.stack([np.clip(ramp + 4 * x, 0, 255) for x in place]).astype(np.uint8)
            episode = file.create_group(f"data/demo_{index}")
            episode.attrs["language_instruction"] = "go"
            episode["actions"] = np.roll(action, shift, axis=0)  # 1: the action that led to the frame
            episode["images"] = np.repeat(frames[..., None], 3, axis=3)
    assert main(["inspect-data", str(tmp_path), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [one["check"] for one in findings] == checks
    assert all("1 step before it" in one["evidence"] and one["severity"] == "doubtful" for one in findings)


@pytest.mark.parametrize("absent", [("min", "max"), ("q01", "q99")])
def test_null_statistics_count_as_missing(absent):
    action = {"q01": [-0.1] * 6 + [0.0], "q99": [0.1] * 6 + [1.0], "min": [-0.2] * 6 + [0.0], "max": [0.2] * 6 + [1.0]}
    without = {field: values for field, values in action.items() if field not in absent}
    null = CheckInput("mine", {**action, **dict.fromkeys(absent)})
    expected = CheckInput("mine", without)
    for field in ("q01", "q99", "min", "max"):
        assert getattr(null, field).tolist() == getattr(expected, field).tolist()
