"""Prompts that begin alike, packed so that their common beginning runs once and padding not at all."""

from __future__ import annotations

import torch
from torch import nn

from ..private_names import version


# Attention grows with the square of a row's length; beyond about this, longer rows do not pay.
MAX_ROW_TOKENS = 128
# Packing must leave less than this part of the padded tokens to be worth its indexing.
WORTHWHILE = 0.8


class PackedPrompts:
    """A causal tower's prompts as rows `[common beginning][ending 1][ending 2]…`, each ending blind to the others.

    In a causal tower a token sees only those before it, so the states of a common beginning ("a photo of a") are the
    same in every prompt. With a mask that shows each ending the beginning and itself, a packed row gives every token
    the state that it has in its own prompt.

    Args:
        input_ids: `(prompts, tokens)`.
        attention_mask: `(prompts, tokens)`, 1 for the tokens of a prompt and 0 for padding on its right.
    """

    def __init__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        ids, lengths = input_ids.cpu(), attention_mask.sum(dim=1).tolist()
        self.prompts, width = ids.shape
        alike = (ids == ids[0]).all(dim=0)[: min(lengths) - 1]
        prefix = int(alike.int().cumprod(dim=0).sum())
        rows: list[list[int]] = []
        for prompt, length in enumerate(lengths):
            used = prefix + sum(lengths[other] - prefix for other in rows[-1]) if rows else MAX_ROW_TOKENS
            if used + length - prefix > MAX_ROW_TOKENS:
                rows.append([])
            rows[-1].append(prompt)
        longest = max(prefix + sum(lengths[prompt] - prefix for prompt in row) for row in rows)
        index = torch.zeros(len(rows), longest, dtype=torch.long)
        # Every token sees itself, even padding: attention to no token at all would give NaN.
        mask = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1, 1)
        last = torch.zeros(self.prompts, dtype=torch.long)
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        for number, row in enumerate(rows):
            index[number, :prefix] = row[0] * width + torch.arange(prefix)
            mask[number, 0, :prefix, :prefix] = causal[:prefix, :prefix]
            start = prefix
            for prompt in row:
                stop = start + lengths[prompt] - prefix
                index[number, start:stop] = prompt * width + torch.arange(prefix, lengths[prompt])
                mask[number, 0, start:stop, :prefix] = True
                mask[number, 0, start:stop, start:stop] = causal[start:stop, start:stop]
                last[prompt] = number * longest + stop - 1
                start = stop
        self.index, self.mask, self.last = (tensor.to(input_ids.device) for tensor in (index, mask, last))
        self.is_worthwhile = index.numel() < WORTHWHILE * ids.numel()

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """`(prompts, tokens, …)` → `(rows, row tokens, …)`."""
        return states.flatten(0, 1)[self.index]

    def last_states(self, states: torch.Tensor, copies: int = 1) -> torch.Tensor:
        """The state of every prompt's last token: `(copies · rows, row tokens, d)` → `(copies · prompts, d)`."""
        flat = states.reshape(copies, -1, states.shape[-1])
        return flat[:, self.last].flatten(0, 1)


class Packing:
    """Packs the prompts of a tower, if they are buffers of the model.

    Unlike a batch, a buffer stays the same from step to step. Nothing carries over from earlier steps, so a resumed
    run packs like one that never stopped, and gets the same rounding.

    Args:
        model: The model in which to look for the buffers.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._key: tuple[int, ...] | None = None
        self._tensors: tuple[torch.Tensor, ...] = ()
        self._values: tuple[torch.Tensor, ...] = ()
        self._prompts: PackedPrompts | None = None

    def prompts(self, ids: torch.Tensor | None, mask: torch.Tensor | None) -> PackedPrompts | None:
        """The packed prompts, or None where the tower should run them as they are."""
        if ids is None or mask is None or mask.dim() != 2:
            return None
        # The versions count changes in place. Both tensors are kept, so that no other can take over their id.
        key = (id(ids), version(ids), id(mask), version(mask))
        if key != self._key:
            buffers = {id(buffer) for buffer in self._model.buffers()}
            if not {id(ids), id(mask)} <= buffers:
                return None
            self._key, self._tensors = key, (ids, mask)
            # Data-parallel wrappers write the same values into a buffer every step.
            if not self._values or not all(map(torch.equal, self._values, self._tensors)):
                self._values = (ids.clone(), mask.clone())
                self._prompts = PackedPrompts(ids, mask) if _is_padded_on_the_right(mask) else None
        return self._prompts if self._prompts is not None and self._prompts.is_worthwhile else None


def _is_padded_on_the_right(mask: torch.Tensor) -> bool:
    mask = mask.long()
    return bool(mask[:, 0].all()) and torch.equal(mask, mask.cumprod(dim=1))
