"""Tokenisation of instructions: refused inputs, and special tokens as text."""

import numpy as np
import pytest
from openvla.configuration_openvla import PROMPTS
from openvla.inference.prompt_checks import ENDINGS, QUESTIONS
from openvla.processing_openvla import tokenize_prompts
from qwen import SPECIAL, write_qwen_tokenizer
from transformers import AutoTokenizer
from transformers.utils import logging

pytestmark = pytest.mark.lane
FRAME = np.zeros((8, 8, 3), np.uint8)


def test_questions_and_endings_follow_from_the_prompts():
    assert QUESTIONS == ("what action should the robot take to",)
    assert ENDINGS == ("out:", "assistant:", "<|im_end|> <|im_start|>assistant", "output:")


@pytest.mark.parametrize(
    "instruction",
    [
        *(prompt.format(instruction="open the drawer") for prompt in PROMPTS.values()),
        "In: What action should the robot take to open the drawer?\nOut: ",
        "What action should the robot take to open the drawer?",
        "WHAT ACTION  should the\nrobot take to open the drawer",
        "In: open the drawer\nOut:",
        "open the drawer?\nOut:",
        "USER: open the drawer ASSISTANT:",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nopen the drawer",
    ],
)
def test_a_complete_prompt_is_refused_as_instruction(tiny, instruction):
    message = "is a whole prompt, or a part of one.*give what the robot should do alone"
    with pytest.raises(ValueError, match=message):
        tiny.processor(instruction=["go", instruction], images=[FRAME] * 2)
    with pytest.raises(ValueError, match=message):
        tiny.processor.prompt(instruction)


@pytest.mark.parametrize(
    "instruction",
    [
        "take the cup out",
        "put the output in: the box",
        "What is this? Pick it up",
        "hand it to the assistant",
        "in the bowl",
    ],
)
def test_words_of_a_prompt_are_allowed(tiny, instruction):
    assert tiny.processor.prompt(instruction) == (
        f"In: What action should the robot take to {instruction.lower()}?\nOut:"
    )


@pytest.mark.parametrize("instruction", [b"open the drawer", [b"go"]])
def test_bytes_are_refused_as_instruction(tiny, instruction):
    with pytest.raises(ValueError, match=r"must be text, got bytes: .*; decode them: .decode\('utf-8'\)"):
        tiny.processor(instruction=instruction, images=FRAME)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("\u200b", "must say something, got '\\\\u200b'"),
        ("...?", "must say something"),
        ("\x00\x00", "must say something"),
        ("go\x00\x00\x00", r"holds what no text has .*: 'go\\x00.*cut padding of zero bytes"),
        ("\ufeffgo", r"holds what no text has .*: '\\ufeffgo'.*utf-8-sig"),
        ("caf\ufffd", "holds what no text has"),
        ("go\x1b[0m", "holds what no text has"),
        ("b'open the drawer'", "is what Python shows of bytes or of a list: .*decode bytes"),
        ('b"the cup\'s lid"', "is what Python shows of bytes"),
        ("['open the drawer']", "is what Python shows of bytes or of a list: .*take the one entry"),
        ("[b'open the drawer']", "is what Python shows of bytes"),
        ("['open', 'close']", "is what Python shows of bytes"),
    ],
)
def test_text_that_is_no_instruction_is_refused(tiny, instruction, message):
    with pytest.raises(ValueError, match=message):
        tiny.processor(instruction=["go", instruction], images=[FRAME] * 2)


@pytest.mark.parametrize(
    "instruction",
    [
        "pick up the cup\nand pour\tit",
        "b 'a' and 'c'",
        "[left] take 'a'",
        "拿起杯子",
        "ارفع الكوب",
        "👉 🍎",
        "👩\u200d🍳 cook",
        "3",
        "می\u200cخواهم",
    ],
)
def test_ordinary_text_of_any_script_is_an_instruction(tiny, instruction):
    assert tiny.processor.prompt(f" {instruction} ") == PROMPTS["openvla"].format(instruction=instruction)


def test_a_prompt_that_differs_from_training_is_warned_of(tiny):
    seen, logger = [], logging.get_logger("openvla.inference.prompt_checks")
    logger.addFilter(lambda record: seen.append(record.getMessage()) or True)
    good = PROMPTS["openvla"].format(instruction="open the drawer")
    untrained = [
        PROMPTS["openvla-v01"].format(instruction="open the drawer"),
        PROMPTS["openvla"].format(instruction="Open the drawer"),
        good.removesuffix("\nOut:"),
        good.replace("In: ", "In:"),
        good.upper(),
        good.replace("\n", " "),
    ]
    try:
        for text in (good, f"{good} ", "In: Is the drawer open?\nOut:"):
            tiny.processor(text, FRAME)
        assert not seen
        tiny.processor(untrained, [FRAME] * len(untrained), padding=True)
    finally:
        logger.filters.clear()
    assert [
        message.partition(" differs from the prompt that this checkpoint was trained on: ")[0] for message in seen
    ] == [f"text={text[-120:]!r}" for text in untrained]


def test_an_instruction_given_as_text_is_warned_of(tiny):
    seen, logger = [], logging.get_logger("openvla.inference.prompt_checks")
    logger.addFilter(lambda record: seen.append(record.getMessage()) or True)
    try:
        tiny.processor("open the drawer", FRAME)
        tiny.processor(tiny.processor.prompt("open the drawer"), FRAME)
        tiny.processor("In: What is in the image?\nOut:", FRAME)
    finally:
        logger.filters.clear()
    assert len(seen) == 1
    assert seen[0].startswith("text='open the drawer' is no prompt")
    assert seen[0].endswith("give it as instruction=.")


@pytest.mark.parametrize("instruction", ["put </s> on <unk> the <s>", "<pad></s>", "<S> and </S>"])
def test_special_tokens_of_llama_are_text(tiny, instruction):
    """One token a character: BOS stands in front alone, and the empty token last."""
    tokenizer, processor = tiny.processor.tokenizer, tiny.processor
    text = "▁" + processor.prompt(instruction).replace(" ", "▁")
    expected = [tokenizer.bos_token_id, *map(tokenizer.convert_tokens_to_ids, text), processor.empty_token_id]
    ids = processor(instruction=instruction, images=FRAME)["input_ids"]
    assert ids.tolist() == [expected]
    batch = processor(instruction=["go", instruction], images=[FRAME] * 2)
    assert batch["input_ids"][1][batch["attention_mask"][1].bool()].tolist() == expected
    alone = processor(instruction="go", images=FRAME)["input_ids"][0].tolist()
    assert batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist() == alone


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "slow where there is one"])
def qwen(request, tmp_path_factory):
    folder = write_qwen_tokenizer(tmp_path_factory.mktemp("qwen") / "qwen")
    return AutoTokenizer.from_pretrained(folder, use_fast=request.param)


def test_special_tokens_of_qwen_are_text(qwen):
    """Those of the prompt stay tokens; those of the instruction are bytes, merged as any text."""
    (ids,) = tokenize_prompts(qwen, "openvla-mini", ["the rob <|im_end|> in<|vision_start|>"])
    tokens = qwen.convert_ids_to_tokens(ids)
    spelled = ["Ġthe", "Ġrob", "Ġ", *"<|im_end|>", "Ġ", "in", *"<|vision_start|>", "?"]
    end = [*spelled, "<|im_end|>", "Ċ", "<|im_start|>", *"assistant", "Ċ"]
    assert tokens[-len(end) :] == end
    assert [token for token in tokens if token in SPECIAL] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
    plain = PROMPTS["openvla-mini"].format(instruction="the rob")
    assert tokenize_prompts(qwen, "openvla-mini", ["the rob"]) == [qwen(plain)["input_ids"]]
    qwen.add_tokens(["<|extra_7|>"])
    (ids,) = tokenize_prompts(qwen, "openvla-mini", ["<|extra_7|>"])
    assert qwen.convert_tokens_to_ids("<|extra_7|>") not in ids


@pytest.mark.parametrize("instruction", [1, {"go": 1}, {"go"}, np.array("go"), ["go", 3], "go \ud800"])
def test_other_types_than_text_are_refused(tiny, instruction):
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="must say something|half of a surrogate pair"):
        tiny.processor(instruction=instruction, images=[image] * 2)
    with pytest.raises(ValueError, match="must be a whole prompt|half of a surrogate pair"):
        tiny.processor(text=instruction, images=[image] * 2)


def test_any_sequence_of_texts_is_a_batch_of_instructions(tiny):
    images = [np.zeros((8, 8, 3), np.uint8)] * 2
    expected = tiny.processor(instruction=["go", "stop"], images=images)["input_ids"].tolist()
    for instructions in (np.array(["go", "stop"]), ("go", "stop"), iter(["go", "stop"])):
        assert tiny.processor(instruction=instructions, images=images)["input_ids"].tolist() == expected


def test_prompts_of_different_lengths_need_padding(tiny):
    prompts = [tiny.processor.prompt(text) for text in ("go", "pick up the red block")]
    with pytest.raises(ValueError, match="they need padding=True"):
        tiny.processor(text=prompts)
    alone = tiny.processor(text=prompts, return_tensors=None)["input_ids"]
    padded = tiny.processor(text=prompts, padding=True)
    assert [ids[mask.bool()].tolist() for ids, mask in zip(padded["input_ids"], padded["attention_mask"])] == alone
