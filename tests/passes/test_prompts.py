import pytest
import torch

from hf_zocl.passes import prompts as packing
from hf_zocl.passes.prompts import PackedPrompts


IDS = torch.tensor([[1, 5, 6, 7, 9, 0], [1, 5, 6, 8, 8, 9], [1, 5, 6, 9, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def test_a_common_beginning_stands_once_and_padding_not_at_all():
    packed = PackedPrompts(IDS, MASK)
    assert packed.pack(IDS).tolist() == [[1, 5, 6, 7, 9, 8, 8, 9, 9]]
    assert packed.is_worthwhile


def test_the_last_state_of_every_prompt_is_that_of_its_last_token():
    packed = PackedPrompts(IDS, MASK)
    states = torch.arange(IDS.numel()).view(3, 6, 1).float()
    expected = states[torch.arange(3), MASK.sum(dim=1) - 1]
    assert torch.equal(packed.last_states(packed.pack(states)), expected)
    both = torch.cat([packed.pack(states), packed.pack(states + 100)])
    assert torch.equal(packed.last_states(both, copies=2), torch.cat([expected, expected + 100]))


def test_a_token_sees_the_beginning_and_its_own_ending_before_it():
    packed = PackedPrompts(IDS, MASK)
    tokens, mask = packed.pack(IDS)[0], packed.mask[0, 0]
    seen = {position: tokens[mask[position]].tolist() for position in (2, 4, 7, 8)}
    assert seen == {2: [1, 5, 6], 4: [1, 5, 6, 7, 9], 7: [1, 5, 6, 8, 8, 9], 8: [1, 5, 6, 9]}


@pytest.mark.parametrize("limit", [7, 9, 100])
def test_rows_are_no_longer_than_their_limit_unless_one_prompt_is(monkeypatch, limit):
    monkeypatch.setattr(packing, "MAX_ROW_TOKENS", limit)
    packed = PackedPrompts(IDS, MASK)
    assert packed.index.shape[1] <= limit
    states = torch.arange(IDS.numel()).view(3, 6, 1).float()
    assert torch.equal(packed.last_states(packed.pack(states)), states[torch.arange(3), MASK.sum(dim=1) - 1])
    assert packed.mask.any(dim=-1).all()


def test_prompts_with_nothing_in_common_are_not_worth_it():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert not PackedPrompts(ids, torch.ones_like(ids)).is_worthwhile


def test_a_single_prompt_and_equal_prompts_work():
    for rows in (1, 2):
        ids = IDS[:1].repeat(rows, 1)
        packed = PackedPrompts(ids, MASK[:1].repeat(rows, 1))
        states = torch.arange(rows * 6).view(rows, 6, 1).float()
        assert torch.equal(packed.last_states(packed.pack(states)), states[:, 4])
