"""What a model says of itself, found wherever it is wrapped."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_zocl import TaskAware
from hf_zocl.passes import task_aware
from hf_zocl.passes.random_state import uncounted

from ..helpers import mini_clip_classifier


class Counter(TaskAware, nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(2, 2), 0

    def forward(self, inputs):
        self.calls += 1
        return self.linear(inputs)

    def training_state(self):
        return {"calls": torch.tensor(self.calls)}

    def load_training_state(self, state):
        self.calls = int(state["calls"])


def test_a_model_that_says_nothing_is_taken_as_it_is():
    for model in (nn.Linear(2, 2), None):
        aware = task_aware(model)
        aware.begin_task(1)
        aware.end_task(1)
        aware.load_training_state(aware.training_state())
        assert (aware.extra_logs(), aware.training_state()) == ({}, {})
        assert not aware.couples_towers and not aware.reloads_frozen_weights


@pytest.mark.parametrize(
    "wrap", [lambda m: m, nn.Sequential, lambda m: get_peft_model(m, LoraConfig(target_modules=["linear"]))]
)
def test_it_is_found_in_what_wraps_it(wrap):
    model = Counter()
    wrapped = wrap(model)
    assert task_aware(wrapped) is model
    wrapped(torch.ones(1, 2))
    with uncounted(wrapped):
        wrapped(torch.ones(1, 2))
    assert model.calls == 1


def test_a_classifier_asks_its_adapter():
    classifier = mini_clip_classifier(adapter="moe")
    assert task_aware(classifier) is classifier
    assert task_aware(classifier.clip) is classifier.clip.base_model
    assert classifier.training_state().keys() == classifier.clip.base_model.training_state().keys() != set()
