"""From image and prompt to action: the reference's actions, batches, statistics, and everything that must be loud."""

import json

import numpy as np
import pytest
import torch
from openvla import (
    ActionOutput,
    ActionTokenizer,
    NoActionError,
    NormalizationStatistics,
    OpenVLAForActionPrediction,
)
from openvla.decoding_openvla import output_from_tokens
from openvla.tiny import UNTRAINED_STATISTICS, build_tiny
from PIL import Image
from predictions import disable_checkpointing, enable_checkpointing
from transformers.utils import logging

pytestmark = pytest.mark.lane

# Where we differ from the reference on purpose (PARITY.md).
EARLY_END = "early_eos"
MASKED_CACHED = "masked_prompt_token_trailing"
MASKED_UNCACHED = "masked_prompt_token_trailing_no_cache"
PAD = 32000


def predict(golden, case, **kwargs):
    mask = case["attention_mask"]
    return golden.model.predict_action(
        torch.tensor([case["input_ids"]]),
        golden.pixel_values[case["image"]][None],
        None if mask is None else torch.tensor([mask]),
        unnorm_key=case["unnorm_key"],
        **{**case["generate_kwargs"], **kwargs},
    )


def cases(golden):
    return {case["name"]: case for case in golden.predict["cases"]}


def test_golden_actions(golden):
    expected = cases(golden)
    for name, case in expected.items():
        if name in (EARLY_END, MASKED_CACHED):
            continue
        output = predict(golden, case, return_dict=True)
        assert output.token_ids.tolist() == case["action_token_ids"], name
        assert output.normalized_actions.tolist() == case["normalized_actions"], name
        assert output.actions.tolist() == case["actions"], name
        action = predict(golden, case)
        assert action.dtype == np.float64
        assert action.tolist() == case["actions"], name
    assert len(expected) >= 12


def test_a_masked_token_stays_masked(golden):
    """The reference unmasks it after the first token; without its cache it agrees with us."""
    expected = cases(golden)
    for use_cache in (True, False):
        output = predict(golden, expected[MASKED_CACHED], return_dict=True, use_cache=use_cache)
        assert output.token_ids.tolist() == expected[MASKED_UNCACHED]["action_token_ids"]


def test_an_early_end_is_an_error(golden):
    """The reference decodes prompt tokens as actions there."""
    case = cases(golden)[EARLY_END]
    with pytest.raises(ValueError, match=r"ended the sequence after \d of 7 action tokens.*constrain_actions=True"):
        predict(golden, case)
    with pytest.raises(ValueError, match="ended the sequence"):
        predict(golden, case, top_k=1, do_sample=True)
    constrained = predict(golden, case, constrain_actions=True, eos_token_id=2)
    assert constrained.shape == (7,)


def test_the_reference_s_errors_are_answered(golden):
    """What fails in the reference works here, or says what to do."""
    errors = {entry["name"]: entry for entry in golden.predict["expected_errors"]}
    case = errors["masked_prompt_token_no_trailing"]
    ids, mask = torch.tensor([case["input_ids"]]), torch.tensor([case["attention_mask"]])
    pixels = golden.pixel_values[case["image"]][None]
    tokens = golden.model.predict_action(ids, pixels, mask, case["unnorm_key"], return_dict=True).token_ids
    assert tokens.tolist() == cases(golden)[MASKED_UNCACHED]["action_token_ids"]
    with pytest.raises(KeyError, match="Known: "):
        golden.model.predict_action(ids, pixels, unnorm_key="does_not_exist")


def padded_batch(rows, side):
    length = max(len(row) for row in rows)
    pads = [[PAD] * (length - len(row)) for row in rows]
    ids = torch.tensor([pad + row if side == "left" else row + pad for pad, row in zip(pads, rows)])
    return ids, (ids != PAD).long()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_singles(golden, side):
    singles = [cases(golden)[f"img{i}_prompt{i}_bridge_orig"] for i in range(3)]
    rows = [case["input_ids"] for case in singles]
    rows[1] = rows[1][:-1]  # one prompt without the empty token
    ids, mask = padded_batch(rows, side)
    actions = golden.model.predict_action(ids, golden.pixel_values, mask, unnorm_key="bridge_orig")
    assert actions.shape == (3, 7)
    assert actions.tolist() == [case["actions"] for case in singles]


@pytest.mark.parametrize("golden", ["fused"], indirect=True)
def test_one_key_a_row(golden):
    keys = ["bridge_orig", "fractal20220817_data", "no_gripper_mask_all_true"]
    expected = cases(golden)
    rows = [expected[f"img{i}_prompt{i}_{key}"] for i, key in enumerate(keys)]
    ids, mask = padded_batch([row["input_ids"] for row in rows], "left")
    actions = golden.model.predict_action(ids, golden.pixel_values, mask, unnorm_key=keys)
    assert actions.tolist() == [row["actions"] for row in rows]
    with pytest.raises(ValueError, match="2 unnorm_keys for a batch of 3"):
        golden.model.predict_action(ids, golden.pixel_values, mask, unnorm_key=keys[:2])
    with pytest.raises(ValueError, match=r"mix action dimensions \[7, 14\]"):
        golden.model.predict_action(ids, golden.pixel_values, mask, unnorm_key=[*keys[:2], "bimanual_14d"])


def test_eager_equals_sdpa(golden):
    eager = OpenVLAForActionPrediction.from_pretrained(
        golden.folder, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert eager.language_model.config._attn_implementation == "eager"
    assert golden.model.language_model.config._attn_implementation == "sdpa"
    for name, case in cases(golden).items():
        if name in (EARLY_END, MASKED_CACHED):
            continue
        mask = case["attention_mask"]
        output = eager.predict_action(
            torch.tensor([case["input_ids"]]),
            golden.pixel_values[case["image"]][None],
            None if mask is None else torch.tensor([mask]),
            unnorm_key=case["unnorm_key"],
            return_dict=True,
            **case["generate_kwargs"],
        )
        assert output.token_ids.tolist() == case["action_token_ids"], name


def test_the_image_is_seen(tiny, frames):
    """Black, white and noise give different logits, and the towers run exactly once an action."""
    ran = []
    hook = tiny.model.vision_backbone.register_forward_hook(lambda *_: ran.append(1))
    logits, actions = {}, {}
    try:
        for name, frame in frames.items():
            inputs = tiny.processor(instruction="pick up the red block", images=frame)
            with torch.no_grad():
                logits[name] = tiny.model(**inputs).logits[:, -1]
            ran.clear()
            actions[name] = tiny.model.predict_action(**inputs, constrain_actions=True)
            assert ran == [1]
    finally:
        hook.remove()
    names = list(frames)
    for first, second in zip(names, names[1:] + names[:1]):
        assert (logits[first] - logits[second]).abs().max() > 0.1
        assert actions[first].tolist() != actions[second].tolist()


def test_return_dict_tells_what_was_behind_the_action(golden):
    case = next(iter(cases(golden).values()))
    output = predict(golden, case, return_dict=True)
    assert isinstance(output, ActionOutput)
    assert output.bin_probabilities.shape == (7, 255)
    assert output.bin_probabilities.dtype == np.float64
    np.testing.assert_allclose(output.bin_probabilities.sum(-1), 1, atol=1e-12)
    assert (output.entropy >= 0).all()
    assert (output.entropy <= np.log(255)).all()
    constrained = predict(golden, case, return_dict=True, constrain_actions=True)
    tokens = constrained.token_ids
    assert ((tokens >= 31744) & (tokens < 32000)).all()
    centers = golden.model.bin_centers
    assert constrained.normalized_actions.tolist() == centers[constrained.bin_probabilities.argmax(-1)].tolist()
    batch = golden.model.predict_action(
        golden.prompts[0].expand(2, -1), golden.pixel_values[:2], unnorm_key="bridge_orig", return_dict=True
    )
    assert batch.actions.shape == (2, 7)
    assert batch["bin_probabilities"].shape == (2, 7, 255)


def test_return_dict_names_the_numbers(frames):
    keys = ["bridge_orig", "libero_object_no_noops"]
    model, processor = build_tiny(norm_stats=dict.fromkeys(keys, UNTRAINED_STATISTICS))
    batch = processor(instruction=["go"] * 2, images=[frames["noise"]] * 2)
    pair = model.predict_action(**batch, unnorm_key=keys, return_dict=True)
    assert pair.names == ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
    metric = ("m",) * 3 + ("rad",) * 3 + ("0 closed to 1 open",)
    assert pair.units == (metric, ("controller units",) * 7)
    one = processor(instruction="go", images=frames["noise"])
    single = model.predict_action(**one, unnorm_key="bridge_orig", return_dict=True)
    assert (single.names, single.units) == (pair.names, metric)


def test_sampling_beams_and_many_answers(golden):
    case = cases(golden)["img0_prompt0_bridge_orig"]
    cold = predict(golden, case, do_sample=True, top_k=1, return_dict=True)
    assert cold.actions.tolist() == case["actions"]
    np.testing.assert_allclose(cold.bin_probabilities.sum(-1), 1, atol=1e-12)
    many = predict(golden, case, do_sample=True, temperature=2.0, num_return_sequences=5, constrain_actions=True)
    assert many.shape == (5, 7)
    assert len({tuple(row) for row in many.tolist()}) > 1
    assert predict(golden, case, num_beams=2).shape == (7,)
    with pytest.raises(ValueError, match="beam search"):
        predict(golden, case, num_beams=2, return_dict=True)
    with pytest.raises(ValueError, match="leave out max_new_tokens"):
        predict(golden, case, max_new_tokens=3)


def test_scores_agree_with_probabilities_and_rank_the_answer_first(tiny, frames):
    inputs = tiny.processor(instruction="open the drawer", images=frames["noise"])
    output = tiny.model.predict_action(**inputs, constrain_actions=True, return_dict=True)
    worse = np.stack([output.actions, -output.actions, np.clip(output.actions + 0.3, -1, 1)])
    scores = tiny.model.score_actions(**inputs, actions=worse)
    assert scores.shape == (1, 3)
    assert scores.dtype == np.float64
    # The same by hand: each token's log-probability in one teacher-forced pass.
    tokens = tiny.model.action_tokenizer.encode(output.normalized_actions)
    ids = torch.cat([inputs["input_ids"], torch.from_numpy(tokens)[None]], dim=1)
    with torch.no_grad():
        logits = tiny.model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -8:-1].double()
    expected = logits.log_softmax(-1)[0, range(7), tokens].sum().item()
    assert abs(scores[0, 0] - expected) < 1e-4
    assert scores[0, 0] == scores.max()


def test_scores_of_a_padded_batch_equal_singles(tiny, frames):
    instructions, images = ["open the drawer", "pick up the red block now"], [frames["noise"], frames["white"]]
    candidates = np.random.RandomState(0).uniform(-0.9, 0.9, (2, 4, 7))
    batch = tiny.processor(instruction=instructions, images=images)
    scores = tiny.model.score_actions(**batch, actions=candidates)
    for index in range(2):
        single = tiny.processor(instruction=instructions[index], images=images[index])
        alone = tiny.model.score_actions(**single, actions=candidates[index])
        np.testing.assert_allclose(scores[index], alone[0], atol=1e-3)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (np.zeros((2, 6)), "7 dimensions"),
        (np.zeros(7), "shape"),
        (np.zeros((0, 7)), "at least one candidate"),
        (np.zeros((3, 2, 7)), "shape"),
        (np.full((1, 7), np.nan), "finite"),
        (None, "needs"),
    ],
)
def test_candidates_that_do_not_fit_are_refused(tiny, frames, actions, message):
    inputs = tiny.processor(instruction="open the drawer", images=frames["noise"])
    with pytest.raises(ValueError, match=message):
        tiny.model.score_actions(**inputs, actions=actions)


def test_statistics_keys(golden):
    model = golden.model
    case = cases(golden)["img0_prompt0_bridge_orig"]
    if golden.name == "siglip":
        assert predict(golden, {**case, "unnorm_key": None}).tolist() == case["actions"]
        assert model.get_action_dim() == 7
        return
    with pytest.raises(ValueError, match="several datasets; pass unnorm_key, one of"):
        predict(golden, {**case, "unnorm_key": None})
    with pytest.raises(KeyError, match="Did you mean 'bridge_orig'"):
        predict(golden, {**case, "unnorm_key": "bridge"})
    assert model.get_action_dim("bimanual_14d") == 14
    assert model.get_action_stats("bridge_orig")["q01"][0] == -0.01481


def test_added_statistics_are_saved_beside_the_weights_and_in_the_configuration(tmp_path):
    model, _ = build_tiny()
    model.add_norm_stats("my_robot", {"q01": [-2.0] * 7, "q99": [2.0] * 7})
    model.save_pretrained(tmp_path)
    for file in ("config.json", "dataset_statistics.json"):
        content = json.loads((tmp_path / file).read_text())
        assert set(content.get("norm_stats", content)) == {"untrained", "my_robot"}
    again = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    assert again.get_action_dim("my_robot") == 7
    with pytest.raises(ValueError, match="q01 exceeds q99"):
        model.add_norm_stats("bad", {"q01": [1.0], "q99": [0.0]})
    assert "bad" not in model.norm_stats


def test_the_statistics_file_wins_and_its_only_key_is_the_default(tmp_path):
    model, _ = build_tiny(norm_stats={"a": UNTRAINED_STATISTICS, "b": UNTRAINED_STATISTICS})
    model.save_pretrained(tmp_path)
    own = {"action": {"q01": [0.0] * 7, "q99": [3.0] * 7}}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps({"b": own}))
    again = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    assert set(again.norm_stats) == {"a", "b"}
    assert again.get_action_stats() == own["action"]
    again.save_pretrained(tmp_path / "again")
    assert OpenVLAForActionPrediction.from_pretrained(tmp_path / "again").get_action_stats() == own["action"]
    again.norm_stats = {"c": own}  # as the reference's scripts do
    assert again.get_action_stats() == own["action"]
    (tmp_path / "dataset_statistics.json").write_text('{"b": {"action": {"q01": [1.0], "q99": [0.0]}}}')
    with pytest.raises(ValueError, match="dataset_statistics.json.*not usable"):
        OpenVLAForActionPrediction.from_pretrained(tmp_path)
    (tmp_path / "dataset_statistics.json").write_text("{")
    with pytest.raises(ValueError, match="dataset_statistics.json.*not usable"):
        OpenVLAForActionPrediction.from_pretrained(tmp_path)


def test_statistics_that_lie_in_the_folder_survive_saving(tmp_path, caplog):
    """As at the end of the published fine-tuning scripts, which write the robot's statistics first."""
    model, _ = build_tiny()
    model.config.default_unnorm_key = "untrained"  # as that of a base with one dataset
    mine = {"my_robot": {"action": {"q01": [-0.05] * 7, "q99": [0.05] * 7, "mask": [True] * 6 + [False]}}}
    (tmp_path / "dataset_statistics.json").write_text(json.dumps(mine))
    model.save_pretrained(tmp_path)
    assert model.config.default_unnorm_key == "untrained"  # the model itself is as it was
    again = OpenVLAForActionPrediction.from_pretrained(tmp_path)
    assert set(again.norm_stats) == {"my_robot", "untrained"}
    assert again.norm_stats["my_robot"] == mine["my_robot"]
    assert again.config.default_unnorm_key is None  # which robot it is has to be said
    model.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    assert OpenVLAForActionPrediction.from_pretrained(tmp_path / "other").config.default_unnorm_key == "untrained"
    (tmp_path / "dataset_statistics.json").write_text("{")
    with pytest.raises(ValueError, match="there already and not usable"):
        model.save_pretrained(tmp_path)


def test_a_model_without_statistics_says_so(frames):
    model, processor = build_tiny(norm_stats=None)
    with pytest.raises(ValueError, match="no action statistics"):
        model.predict_action(**processor(instruction="go", images=frames["noise"]))


def test_broken_weights_do_not_move_a_robot(frames):
    model, processor = build_tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight[5, 5] = float("nan")
    inputs = processor(instruction="go", images=frames["noise"])
    with pytest.raises(ValueError, match="not finite"):
        model.predict_action(**inputs)
    with pytest.raises(ValueError, match="not finite"):
        model.score_actions(**inputs, actions=np.zeros((1, 7)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pixel_values": None}, ValueError, "needs input_ids and pixel_values"),
        ({"input_ids": None}, ValueError, "needs input_ids and pixel_values"),
        ({"input_ids": torch.tensor([1, 2])}, ValueError, r"shape \(batch, length\)"),
        ({"input_ids": torch.tensor([[1.0, 2.0]])}, ValueError, "integer tensor"),
        ({"input_ids": torch.zeros((1, 0), dtype=torch.long)}, ValueError, "empty"),
        ({"attention_mask": torch.ones(1, 9)}, ValueError, "attention_mask has shape"),
        ({"attention_mask": torch.zeros(1, 3)}, ValueError, "hides a whole prompt"),
        ({"pixel_values": torch.zeros(2, 6, 224, 224)}, ValueError, "1 prompts but 2 images"),
        ({"pixel_values": torch.zeros(1, 3, 224, 224)}, ValueError, "must have shape"),
        ({"pixel_values": np.zeros((1, 6, 224, 224))}, TypeError, "floating-point tensor"),
        ({"unnorm_key": "untraine"}, KeyError, "Did you mean 'untrained'"),
    ],
)
def test_bad_inputs_are_refused(tiny, change, error, message):
    inputs = {"input_ids": torch.tensor([[1, 300, 301]]), "pixel_values": torch.zeros(1, 6, 224, 224), **change}
    with pytest.raises(error, match=message):
        tiny.model.predict_action(**inputs)


def test_padding_without_a_mask_is_refused(tiny):
    pad = tiny.model.pad_token_id
    with pytest.raises(ValueError, match="no attention_mask"):
        tiny.model.predict_action(torch.tensor([[1, 300, 301], [1, 300, pad]]), torch.zeros(2, 6, 224, 224))


def test_bfloat16_takes_float32_images(frames):
    model, processor = build_tiny()
    model = model.to(torch.bfloat16)
    inputs = processor(instruction="pick up the red block", images=frames["noise"])
    output = model.predict_action(**inputs, constrain_actions=True, return_dict=True)
    assert output.actions.dtype == np.float64
    assert np.isfinite(output.actions).all()


def test_tokens_that_are_no_actions_are_said_every_time(golden):
    case = cases(golden)["img0_prompt0_bridge_orig"]
    outside = [t for t in case["action_token_ids"] if not 31744 <= t < 32000]
    assert outside  # else this golden case proves nothing
    module_logger = logging.get_logger("openvla.decoding_openvla")
    seen = []
    module_logger.addFilter(lambda record: seen.append(record.getMessage()) or True)
    try:
        predict(golden, case)
        predict(golden, case)
    finally:
        module_logger.filters.clear()
    assert len(seen) == 2
    assert f"{len(outside)} of 7 predicted tokens are not action tokens" in seen[1]
    with pytest.raises(NoActionError, match=f"{len(outside)} of 7 predicted tokens are not action tokens"):
        predict(golden, case, strict=True)


@pytest.mark.parametrize("golden", ["fused"], indirect=True)
@pytest.mark.parametrize("chosen", [{}, {"do_sample": True, "top_k": 1}, {"num_beams": 2}, {"fast": False}])
def test_words_are_no_action(golden, chosen):
    """As of a model that thinks in words first: none of its tokens is an action's."""
    case = cases(golden)["img1_prompt1_bridge_orig"]
    weights = golden.model.get_output_embeddings().weight.data
    saved = weights[31744:32000].clone()
    weights[31744:32000] = 0  # such a token is never the likeliest
    try:
        with pytest.raises(NoActionError, match=r"7 of 7 predicted tokens are not action tokens, so .*yourself"):
            predict(golden, case, eos_token_id=[], **chosen)
    finally:
        weights[31744:32000] = saved


@pytest.mark.parametrize("count", [5, 6])
def test_the_share_of_other_tokens_that_is_decoded(count):
    """Five of seven as in the golden cases, to the extreme bins; in a batch the row with the most counts."""
    tokenizer = ActionTokenizer(32000)
    statistics = NormalizationStatistics({"q01": [-1.0] * 7, "q99": [1.0] * 7})
    tokens = torch.tensor([[31872] * 7, [5] * count + [31872] * (7 - count)])
    if count == 6:
        with pytest.raises(NoActionError, match="6 of 7"):
            output_from_tokens(tokens, tokenizer, [statistics] * 2)
    else:
        actions = output_from_tokens(tokens, tokenizer, [statistics] * 2).actions
        assert actions[1, :5].tolist() == [tokenizer.bin_centers[-1]] * 5
        assert actions[0].tolist() == [tokenizer.bin_centers[127]] * 7


def test_an_action_that_is_not_finite_is_none():
    statistics = NormalizationStatistics({"q01": [-1.0] * 7, "q99": [1.0] * 7})
    statistics.low, statistics.high = np.full(7, -1.7e308), np.full(7, 1.7e308)  # which are refused by themselves
    with np.errstate(over="ignore"), pytest.raises(NoActionError, match="The action is not finite.*statistics"):
        output_from_tokens(torch.tensor([[31744] * 7]), ActionTokenizer(32000), [statistics])


@pytest.mark.parametrize("golden", ["fused"], indirect=True)
def test_training_mode_with_checkpointing_still_sees_the_image(golden):
    """No cache comes back then; a loop that trusts in one would feed single tokens to an empty model."""
    case = cases(golden)["img1_prompt1_bridge_orig"]
    golden.model.train()
    enable_checkpointing(golden.model)
    try:
        assert predict(golden, case).tolist() == case["actions"]
        with pytest.raises(ValueError, match="needs model.eval()"):
            predict(golden, case, do_sample=True)
    finally:
        disable_checkpointing(golden.model)
        golden.model.eval()


def test_the_reference_s_readme_call(tiny, frames):
    """processor(prompt, image).to(device, dtype=...), as every snippet on the web writes it."""
    inputs = tiny.processor("In: What action should the robot take to go?\nOut:", Image.fromarray(frames["noise"]))
    inputs = inputs.to("cpu", dtype=torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64
    assert tiny.model.predict_action(**inputs, unnorm_key="untrained", do_sample=False).shape == (7,)
