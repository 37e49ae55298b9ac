"""Bins and statistics, against the reference's tables."""

import json

import numpy as np
import pytest
from openvla import ActionTokenizer, NormalizationStatistics
from openvla.actions_openvla import NORMALIZATION_EPSILON, nearest_name, validate_norm_stats
from openvla.dimension_labels import dimension_labels
from reference import GOLDEN

TABLES = np.load(GOLDEN / "action_tokenizer" / "tables.npz")
NOTES = json.loads((GOLDEN / "action_tokenizer" / "notes.json").read_text())
LAYOUTS = {"bins256_-1_1": (256, -1, 1), "bins64_-1_1": (64, -1, 1), "bins256_-2_3": (256, -2, 3)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_equal_the_reference(layout):
    tokenizer = ActionTokenizer(32000, *LAYOUTS[layout])
    table = {key.split("/")[1]: TABLES[key] for key in TABLES if key.startswith(layout + "/")}
    assert np.array_equal(tokenizer.bins, table["bins"])
    assert np.array_equal(tokenizer.bin_centers, table["bin_centers"])
    assert tokenizer.first_token_id - 1 == table["action_token_begin_idx"]
    for kind in ("f64", "f32"):
        actions, ids = table[f"actions_{kind}"], table[f"ids_{kind}"]
        numbers = ~np.isnan(actions)
        assert np.array_equal(tokenizer.encode(actions[numbers]), ids[numbers])
    assert np.array_equal(tokenizer.encode(table["batch_actions"]), table["batch_ids"])
    assert np.array_equal(tokenizer.decode(table["decode_ids"]), table["decoded"])
    assert np.array_equal(tokenizer.decode(table["decode_odd_ids"]), table["decoded_odd"])
    assert tokenizer.decode(table["decode_ids"]).dtype == np.float64


def test_special_values_equal_the_reference():
    tokenizer = ActionTokenizer(32000)
    for note, value in {"pos_inf": np.inf, "neg_inf": -np.inf, "one": 1.0, "minus_one": -1.0, "zero": 0.0}.items():
        assert tokenizer.encode([value]).tolist() == NOTES[note]
    assert tokenizer.encode(np.nextafter(np.array([1.0]), 0)).tolist() == NOTES["just_below_one"]
    assert tokenizer.encode(np.float32([1.0])).tolist() == NOTES["one_f32"]
    for token in (31744, 31745, 31999, 32000):
        assert tokenizer.decode([token])[0] == NOTES[f"decode_{token}"]


def test_every_bin_survives_the_round_trip():
    tokenizer = ActionTokenizer(32000)
    assert np.array_equal(tokenizer.decode(tokenizer.encode(tokenizer.bin_centers)), tokenizer.bin_centers)
    assert tokenizer.encode(np.zeros((2, 3, 7))).shape == (2, 3, 7)
    assert tokenizer.encode(0.25).shape == ()


def test_nan_is_refused():
    with pytest.raises(ValueError, match="NaN: 1 of 7"):
        ActionTokenizer(32000).encode([0, 0, 0, np.nan, 0, 0, 0])


@pytest.mark.parametrize("arguments", [(32000, 1), (100, 256), (32000, 256, 1, -1)])
def test_impossible_layouts_are_refused(arguments):
    with pytest.raises(ValueError):
        ActionTokenizer(*arguments)


def test_float_token_ids_are_refused():
    with pytest.raises(TypeError, match="integers"):
        ActionTokenizer(32000).decode([31744.0])


def test_unnormalize_masks_the_gripper():
    statistics = NormalizationStatistics({"q01": [-2.0, 0.0], "q99": [4.0, 1.0], "mask": [True, False]})
    assert statistics.unnormalize(np.array([0.5, 0.5])).tolist() == [2.5, 0.5]
    assert statistics.dimension == 2


def test_normalize_inverts_unnormalize():
    statistics = NormalizationStatistics({"q01": [-0.3, -1.0, 0.2], "q99": [0.7, 5.0, 0.2], "mask": [True, True, True]})
    tokenizer = ActionTokenizer(32000)
    ids = np.stack([np.arange(31745, 32000)] * 3, axis=1)
    back = tokenizer.encode(statistics.normalize(statistics.unnormalize(tokenizer.decode(ids))))
    assert np.array_equal(back[:, :2], ids[:, :2])
    assert (back[:, 2] == tokenizer.encode(0.0)).all()  # a constant dimension is trained as zero
    assert statistics.normalize(np.array([9.0, -9.0, 0.2])).tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("normalization", ["q99", "bounds"])
@pytest.mark.parametrize("epsilon", [0.0, NORMALIZATION_EPSILON])
@pytest.mark.parametrize("constant", [0.0, -0.0, 0.1, -3.5, 1e6, float(np.float32(0.7))])
def test_a_constant_dimension_is_exactly_its_value(normalization, epsilon, constant):
    """Whatever the model says there; the dimension beside it keeps the reference's formula, in every bit."""
    low, high = ("q01", "q99") if normalization == "q99" else ("min", "max")
    ranges = {low: [constant, -0.3, constant], high: [constant, 0.7, constant], "mask": [True, True, False]}
    statistics = NormalizationStatistics(ranges, normalization=normalization, epsilon=epsilon)
    for dtype in (np.float32, np.float64):
        normalized = np.array([[-1.0, 0.25, 0.5], [0.0, 0.25, 0.5], [0.996, 0.25, 0.5], [1.7, 0.25, 0.5]], dtype)
        actions = statistics.unnormalize(normalized)
        assert (actions[:, 0] == constant).all()
        scale = np.float64([0.7 - -0.3 + epsilon])
        assert (actions[:, 1] == 0.5 * (normalized[:, 1] + 1) * scale + np.float64([-0.3])).all()
        assert (actions[:, 2] == 0.5).all()  # outside the mask: as the model says
    assert np.isnan(statistics.unnormalize(np.array([np.nan, 0.0, 0.0]))[0])  # never made a number


GOOD = {"q01": [0.0, 0.0], "q99": [1.0, 1.0], "mask": [True, False]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q99": [1.0]}, "lengths must agree"),
        ({"mask": [True]}, "mask has 1 entries"),
        ({"q01": [0.0, np.nan]}, "finite"),
        ({"q99": [1.0, np.inf]}, "finite"),
        ({"q01": [0.0, 2.0]}, "q01 exceeds q99 in dimension 1"),
        ({"q01": [], "q99": []}, "non-empty"),
        ({"q01": [[0.0, 0.0]]}, "flat list"),
        ({"mean": [0.0]}, "mean has 1 entries"),
        ({"q01": ["a", "b"]}, "finite numbers"),
        ({"q01": ["0", "0"]}, "finite numbers"),
        ({"q01": None}, "missing"),
        ({"std": [0.0, [0.0]]}, "std must be finite numbers, in rows of equal lengths"),
        ({"q01": [-1e308, 0.0], "q99": [1e308, 1.0]}, "dimension 0 .* is beyond float64"),
        ({"q99": [True, True]}, "not true or false"),
        ({"mask": [0.5, 1]}, "mask must hold true or false"),
    ],
)
def test_bad_statistics_are_named(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        validate_norm_stats({"my_robot": {"action": {**GOOD, **change}}})
    assert "my_robot" in str(caught.value)


def test_whole_numbers_are_statistics_as_good_as_others():
    whole = NormalizationStatistics({"q01": [-(2**62), 0], "q99": [2**62, 3], "mask": [1, 1]})
    assert whole.unnormalize(np.array([1.0, 0.0])).tolist() == [2.0**62, 1.5]  # int64 would have overflowed
    half = NormalizationStatistics({"q01": np.zeros(2, np.float32), "q99": np.full(2, 0.1, np.float32)})
    assert half.high.dtype == np.float32
    assert half.unnormalize(np.ones(2)).tolist() == [float(np.float32(0.1))] * 2


def test_a_wide_range_normalises_its_middle_to_zero():
    wide = NormalizationStatistics({"q01": [-4e307], "q99": [4e307]})
    assert wide.normalize(np.array([[0.0], [2e307], [1.7e308], [-1.7e308]])).ravel().tolist() == [0.0, 0.5, 1.0, -1.0]


@pytest.mark.parametrize("bad", [{"k": {}}, {"k": {"action": {"q01": [0.0]}}}, {"k": 1}, [1], {"k": {"action": []}}])
def test_malformed_statistics_are_refused(bad):
    with pytest.raises(ValueError):
        validate_norm_stats(bad)


def test_actions_that_do_not_fit_are_refused():
    statistics = NormalizationStatistics(GOOD)
    with pytest.raises(ValueError, match="2 dimensions"):
        statistics.normalize([0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="finite"):
        statistics.normalize([0.0, np.inf])


def test_labels_claim_units_only_where_they_are_known():
    assert dimension_labels(7, "bridge_orig")[0] == ("dx", "m")
    assert dimension_labels(7, "libero_spatial_no_noops")[6] == ("gripper", "controller units")
    assert dimension_labels(7, "my_robot")[0] == ("dx", "dataset units")
    assert dimension_labels(14, "bimanual")[13] == ("action[13]", "dataset units")


def test_nearest_name():
    known = ["libero_spatial_no_noops", "bridge_orig"]
    assert nearest_name("libero_spatial", known) == "libero_spatial_no_noops"
    assert nearest_name("bridge", known) == "bridge_orig"
    assert nearest_name("zzz", known) is None
