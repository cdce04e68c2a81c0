"""`hyperparameter_search`: every trial trains a new model by the arguments that it sets, as a fresh trainer would."""

import pytest
import torch

from hf_zocl import ZOCLTrainer
from tests.helpers import Mlp, arguments, rows


def trial(trainer: ZOCLTrainer, **hyperparameters) -> dict[str, torch.Tensor]:
    """Train as a trial does, which sets arguments one by one, and makes the model anew."""
    for name, value in hyperparameters.items():
        setattr(trainer.args, name, value)
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def a_trainer(tmp_path, **options) -> ZOCLTrainer:
    args = arguments(tmp_path, **{"zo_layers": [1], "zo_eps": 1e-2, "zo_learning_rate": 1e-2, **options})
    return ZOCLTrainer(model_init=lambda: Mlp(), args=args, train_dataset=rows())


def assert_equal(found: dict, expected: dict) -> None:
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(not torch.equal(found[name], value) for name, value in Mlp().named_parameters())


def test_a_trial_that_switches_zeroth_order_off_trains_its_own_model(tmp_path):
    for layers in ([1], "all"):
        expected = trial(a_trainer(tmp_path, zo_branch="none"))
        searched = a_trainer(tmp_path, zo_branch="dual", zo_layers=layers)
        trial(searched)
        assert_equal(trial(searched, zo_branch="none"), expected)
        assert searched.split is None and searched.replay_log is None


def test_a_trial_that_switches_zeroth_order_on_trains_those_layers(tmp_path):
    expected = trial(a_trainer(tmp_path, zo_branch="dual"))
    searched = a_trainer(tmp_path, zo_branch="none")
    trial(searched)
    assert_equal(trial(searched, zo_branch="dual"), expected)


def test_numbers_that_a_search_sets_where_auto_was_are_numbers(tmp_path):
    expected = trial(a_trainer(tmp_path, zo_branch="dual"))
    searched = a_trainer(tmp_path, zo_branch="dual", zo_eps="auto", zo_learning_rate="auto")
    # transformers casts a trial's number to the type of what was there.
    assert_equal(trial(searched, zo_eps="0.01", zo_learning_rate="0.01"), expected)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"zo_layers": [1]}, {"zo_layers": [2]}),
        ({"zo_layers": "all"}, {"zo_branch": "none"}),
        ({"zo_branch": "none"}, {"zo_branch": "dual"}),
        ({"zo_layers": "all", "zo_optim": "sgd"}, {"zo_optim": "sign"}),
        ({"zo_layers": "all", "zo_optim": "sgd", "zo_momentum": 0.0}, {"zo_momentum": 0.9}),
        ({"zo_layers": "all"}, {"zo_weight_decay": 0.5}),
        ({"zo_layers": "all"}, {"zo_learning_rate": 1e-4}),
        ({"zo_layers": "all", "zo_learning_rate": "auto"}, {"zo_learning_rate": 1e-4}),
        ({"zo_layers": "all", "zo_momentum": None}, {"zo_estimator": "conservative"}),
    ],
)
def test_a_second_call_of_train_with_other_arguments_trains_as_a_new_trainer_of_that_model(tmp_path, first, then):
    trainer = a_trainer(tmp_path, **first)
    trial(trainer)
    trainer.model_init = None  # the same model goes on
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    found = trial(trainer, **then)

    fresh = a_trainer(tmp_path, **{**first, **then})
    fresh.model_init = None
    fresh.model.load_state_dict(before)
    expected = trial(fresh)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(found[name], before[name]) for name in expected)
    assert (trainer.replay_log is None) == (fresh.replay_log is None)
