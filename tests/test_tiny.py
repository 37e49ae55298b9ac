"""The tokenizer of the tiny models."""

import pytest
from openvla.tiny import N_ACTION_BINS, build_tokenizer

PROMPT = "In: What action should the robot take to pick up the tomato sauce?\nOut:"


@pytest.mark.lane
def test_words_become_tokens_and_nothing_is_lost():
    plain, spoken = build_tokenizer(), build_tokenizer(words=["to", "tomato", "the", "take", "robot", "What"])
    ids = spoken(PROMPT)["input_ids"]
    tokens = spoken.convert_ids_to_tokens(ids)
    assert {"▁to", "▁tomato", "▁the", "▁take", "▁robot", "▁What"} <= set(tokens)
    assert tokens.count("▁the") == 2
    assert len(ids) < len(plain(PROMPT)["input_ids"])
    for tokenizer in (plain, spoken):
        again = tokenizer(PROMPT)["input_ids"]
        assert tokenizer.decode(again, skip_special_tokens=True) == PROMPT
        actions = range(tokenizer.pad_token_id - N_ACTION_BINS, tokenizer.pad_token_id)
        assert tokenizer.convert_ids_to_tokens(list(actions)) == [f"<action_{i}>" for i in range(N_ACTION_BINS)]
        assert not set(again) & set(actions)


@pytest.mark.lane
def test_a_vocabulary_of_a_given_size_stays_so():
    assert build_tokenizer(32000, words=["to"]).pad_token_id == build_tokenizer(32000).pad_token_id == 32000
