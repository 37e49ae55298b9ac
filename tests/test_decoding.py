"""Layout of sequences and choice of tokens, against loops that a reader can follow."""

from types import SimpleNamespace

import pytest
import torch
from openvla.compatibility_openvla import CACHE_FIELD, cached_length
from openvla.decoding_openvla import (
    align_prompts,
    append_token,
    decode_greedily,
    has_gap,
    insert_after_bos,
    positions_of,
    require_complete_actions,
)

CPU = torch.device("cpu")


def test_patches_go_behind_each_row_s_bos():
    generator = torch.Generator().manual_seed(0)
    for shape in [(), (5,)]:
        sequence = torch.randn(3, 6, *shape, generator=generator)
        inserted = torch.randn(3, 4, *shape, generator=generator)
        bos = torch.tensor([0, 2, 5])
        expected = torch.stack(
            [torch.cat([row[: b + 1], new, row[b + 1 :]]) for row, new, b in zip(sequence, inserted, bos.tolist())]
        )
        assert torch.equal(insert_after_bos(sequence, inserted, bos), expected)


def test_padding_moves_to_the_left_and_order_stays():
    ids = torch.tensor([[0, 0, 1, 7, 8], [1, 7, 8, 9, 0], [1, 7, 8, 9, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    aligned, aligned_mask = align_prompts(ids, mask, 0, CPU)
    assert aligned.tolist() == [[0, 0, 1, 7, 8], [0, 1, 7, 8, 9], [1, 7, 8, 9, 5]]
    assert aligned_mask.tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert positions_of(aligned_mask).tolist() == [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert has_gap(aligned_mask)
    assert not has_gap(aligned_mask[[0, 2]])
    assert align_prompts(ids[2:], mask[2:].bool(), 0, CPU)[1] is None


def test_the_empty_token_is_appended_where_it_is_missing():
    ids = torch.tensor([[0, 1, 7], [1, 7, 9]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert append_token(ids[1:], mask[1:], 9, 0)[0].tolist() == [[1, 7, 9]]
    both, both_mask = append_token(ids, mask, 9, 0)
    assert both.tolist() == [[0, 1, 7, 9], [0, 1, 7, 9]]
    assert both_mask.tolist() == [[0, 1, 1, 1], [0, 1, 1, 1]]
    neither, neither_mask = append_token(ids, mask, 5, 0)
    assert neither.tolist() == [[0, 1, 7, 5], [1, 7, 9, 5]]
    assert neither_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert append_token(ids[:, 1:], None, 5, 0)[1] is None
    assert append_token(ids, None, 9, 0)[1].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


class Scripted(torch.nn.Module):
    """A language model that says given logits, one row of them a step, and notes what it was asked."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.calls = torch.tensor(steps), []

    def forward(self, **inputs):
        self.calls.append(inputs)
        logits = self.steps[len(self.calls) - 1][None, None].expand(1, 3, -1)
        return SimpleNamespace(logits=logits, **{CACHE_FIELD: ((torch.zeros(1, 1, 3, 1),) * 2,)})


def test_of_equal_logits_the_first_wins():
    model = Scripted([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    tokens, logits = decode_greedily(model, torch.zeros(1, 3, 2, dtype=torch.bfloat16), None, 2, None)
    assert tokens.tolist() == [[1, 0]]
    assert logits.dtype == torch.float32
    assert model.calls[1]["input_ids"].tolist() == [[1]]
    assert cached_length(model.calls[1][CACHE_FIELD]) == 3


def test_constrained_tokens_stay_in_their_range():
    tokens, _ = decode_greedily(Scripted([[9.0, 1.0, 2.0, 9.0]]), torch.zeros(1, 3, 2), None, 1, None, slice(1, 3))
    assert tokens.tolist() == [[2]]


def test_the_mask_and_positions_grow_with_the_tokens():
    model = Scripted([[1.0, 0.0]] * 3)
    decode_greedily(model, torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]]), 3, None)
    assert [call["attention_mask"].tolist() for call in model.calls] == [[[0, 1, 1]], [[0, 1, 1, 1]], [[0, 1, 1, 1, 1]]]
    assert [call["position_ids"].tolist() for call in model.calls] == [[[0, 0, 1]], [[2]], [[3]]]


def test_an_end_before_the_last_step_is_an_error():
    embeds = torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match="after 1 of 2"):
        decode_greedily(Scripted([[1.0, 0.0], [0.0, 1.0]]), embeds, None, 2, [0, 5])
    tokens, _ = decode_greedily(Scripted([[1.0, 0.0], [0.0, 1.0]]), embeds, None, 2, 1)  # as in the reference
    assert tokens.tolist() == [[0, 1]]
    require_complete_actions(torch.tensor([[4, 4, 2]]), 3, 2)
    with pytest.raises(ValueError, match="after 2 of 3"):
        require_complete_actions(torch.tensor([[4, 4, 4], [4, 2, 2]]), 3, [2])
    with pytest.raises(ValueError, match="after 1 of 3"):
        require_complete_actions(torch.tensor([[4]]), 3, None)


def test_nan_is_an_error():
    with pytest.raises(ValueError, match="not finite"):
        decode_greedily(Scripted([[float("nan"), 0.0]]), torch.zeros(1, 3, 2), None, 1, None)


def test_length_of_every_kind_of_cache():
    assert cached_length(None) == cached_length(()) == 0
    assert cached_length(((torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)),)) == 5
    assert cached_length(SimpleNamespace(get_seq_length=lambda: 3)) == 3
