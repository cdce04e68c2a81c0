"""Plug-ins of a stream: when they are asked, what is kept of them, and what classifier alignment computes."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hf_zocl import ClassifierAlignment, TaskPlugin, load_task_checkpoint
from hf_zocl.commands.recipe import build_scheduler
from hf_zocl.continual.plugins import load_plugins, plugin_file
from hf_zocl.continual.task_check import TaskError
from hf_zocl.trainer.resumable import ResumeError
from tests.continual.test_scheduler import small_recipe
from tests.helpers import slow_but_for


pytestmark = pytest.mark.usefixtures("quick_pictures")


CLASSES = ("--class_order", "3", "8", "0", "1")


def weights(folder, task: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"task-{task:02d}" / "adapter_model.safetensors")


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def as_saved(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters by the names that a checkpoint's file has for them."""
    return {name.removeprefix("clip.").replace(".default.", "."): value for name, value in named.items()}


def run(folder, *arguments, plugins=()):
    scheduler = build_scheduler(small_recipe(folder, *CLASSES, *arguments))
    scheduler.callbacks += plugins
    scheduler.run()
    return scheduler


class Towards(TaskPlugin):
    """θ ← θ_before + α·(θ − θ_before)."""

    def __init__(self, alpha: float):
        self.alpha, self.calls, self.known = alpha, [], torch.zeros(1)

    def begin_run(self, stream, model):
        self.calls.append("run")

    def begin_task(self, task, trainer):
        self.calls.append(("begin", task.index, trainer.state.global_step))
        self.before = parameters(trainer.model)

    def end_task(self, task, trainer):
        self.calls.append(("end", task.index, trainer.state.global_step))
        self.after = parameters(trainer.model)
        self.known = self.known + task.index
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if name in self.before:
                    parameter.copy_(self.before[name].lerp(self.after[name], self.alpha))

    def state(self):
        return {"known": self.known}

    def load_state(self, state):
        self.known = state.get("known", torch.zeros(1))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    run(folder)
    return folder


def test_a_plugin_that_does_nothing_changes_no_bit(plain, tmp_path):
    run(tmp_path, plugins=[TaskPlugin()])
    for task in (1, 2):
        mine, theirs = weights(plain, task), weights(tmp_path, task)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_a_plugin_makes_of_the_weights_is_measured_saved_and_trained_further(plain, tmp_path):
    halfway = Towards(0.5)
    scheduler = run(tmp_path, plugins=[halfway])
    assert halfway.calls == ["run", ("begin", 1, 0), ("end", 1, 3), ("begin", 2, 0), ("end", 2, 3)]
    reference = build_scheduler(small_recipe(tmp_path / "unused", *CLASSES)).model
    initial, begun = as_saved(parameters(reference)), as_saved(halfway.before)
    trained, saved = weights(plain, 1), weights(tmp_path, 1)  # until the plug-in is asked, the two runs are the same
    assert saved.keys() == initial.keys()
    for name, value in saved.items():
        assert torch.equal(value, initial[name].lerp(trained[name], 0.5))
        assert torch.equal(value, begun[name])  # the second task's beginning
    assert "Plug-ins that took part in every task: `Towards`." in (tmp_path / "task-02" / "README.md").read_text()
    loaded, _ = load_task_checkpoint(tmp_path / "task-02")
    loaded = dict(loaded.named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in parameters(scheduler.model).items())


@pytest.mark.slow
def test_no_log_of_steps_is_kept_that_would_lead_to_other_weights(tmp_path):
    run(tmp_path / "towards", "--zo_layers", "all", plugins=[Towards(0.5)])
    run(tmp_path / "nothing", "--zo_layers", "all", plugins=[TaskPlugin()])
    assert not (tmp_path / "towards" / "replay").exists()
    assert (tmp_path / "nothing" / "replay" / "task-02.safetensors").is_file()


def test_weights_that_a_plugin_spoils_are_not_saved(tmp_path):
    with pytest.raises(TaskError, match="the weights are not finite"):
        run(tmp_path, plugins=[Towards(float("nan"))])
    assert not (tmp_path / "task-01").exists()


def test_a_state_is_saved_with_the_task_and_given_back(tmp_path):
    run(tmp_path, plugins=[Towards(1.0)])
    assert load_file(tmp_path / "task-01" / "plugins.safetensors")["Towards.known"] == 1
    assert "plugins.safetensors" in json.loads((tmp_path / "task-01" / "task.json").read_text())["files"]
    fresh = Towards(1.0)
    load_plugins([fresh], tmp_path / "task-02")
    assert fresh.known == 3
    load_plugins([fresh], None)  # a run that begins knows nothing
    assert fresh.known == 0
    with pytest.raises(ResumeError, match="has the plug-ins Towards, but this one has no plug-ins"):
        load_plugins([], tmp_path / "task-02")
    (tmp_path / "task-02" / "plugins.safetensors").write_bytes(b"half a file")
    with pytest.raises(ResumeError, match=r"plugins.safetensors is damaged"):
        load_plugins([fresh], tmp_path / "task-02")


def test_without_plugins_there_is_no_file(plain):
    assert "Plug-ins" not in (plain / "task-02" / "README.md").read_text()
    assert plugin_file([]) == {}
    assert not (plain / "task-01" / "plugins.safetensors").exists()


def test_two_plugins_of_one_class_are_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="callbacks: 2 plug-ins of the class Towards; expected one"):
        run(tmp_path / "run", plugins=[Towards(1.0), Towards(0.5)])
    assert not (tmp_path / "run").exists()


def test_the_statistics_are_the_means_and_the_scatter_around_them():
    alignment = ClassifierAlignment()
    alignment.add(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0, 1]))
    assert alignment.state()["means"].tolist() == [[2, 0], [0, 5]]
    assert alignment.state()["scatter"].tolist() == [[2, 0], [0, 0]]
    alignment.add(torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 3.0]]), torch.tensor([2, 2, 2]))
    assert alignment.state()["means"].tolist() == [[2, 0], [0, 5], [1, 1]]
    assert alignment.state()["scatter"].tolist() == [[2, 0], [0, 8]]
    assert alignment.state()["images"].tolist() == [2, 1, 3]


def test_features_are_drawn_around_the_means_with_the_common_covariance():
    alignment = ClassifierAlignment()
    means = torch.tensor([[0.0, 0.0, 100.0], [30.0, 0.0, 100.0]])
    covariance = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    alignment.load_state({"means": means, "scatter": 50 * covariance, "images": torch.tensor([20, 30])})
    features, labels = alignment.draw(40_000, seed=0)
    assert torch.bincount(labels).tolist() == pytest.approx([20_000, 20_000], rel=0.03)
    assert torch.allclose(features.norm(dim=-1), torch.ones(40_000))
    values = 100 * features / features[:, 2:]  # the third coordinate has no noise
    for label, mean in enumerate(means):
        mine = values[labels == label]
        assert torch.allclose(mine.mean(dim=0), mean, atol=0.05)
        assert torch.allclose(mine.T.cov(), covariance, atol=0.1)
    again, _ = alignment.draw(40_000, seed=0)
    other, _ = alignment.draw(40_000, seed=1)
    assert torch.equal(again, features)
    assert not torch.equal(other, features)


def test_features_that_are_drawn_do_not_hang_on_the_last_bit_of_the_statistics():
    """Processes add up in another order; eigenvectors turn with the last bit where eigenvalues are alike, or zero."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 64, generator=generator)  # fewer than dimensions: the covariance is singular
    other = images * (1 + 6e-8 * torch.randn(40, 64, generator=generator))
    drawn = []
    for features in (images, other):
        alignment = ClassifierAlignment()
        alignment.add(features, torch.arange(40) % 2)
        drawn.append(alignment.draw(500, seed=0)[0])
    assert not torch.equal(images, other)
    assert (drawn[0] - drawn[1]).norm() < 1e-6 * drawn[0].norm()  # by the eigenvectors alone 1e-4


MIXES = {
    "first-order": ("--zo_branch", "none"),
    "zeroth-order in the other tower": ("--zo_branch", "vision", "--zo_layers", "hop-odd"),
    "hop-even": (),
    "forward passes alone, moe": (
        "--adapter",
        "moe",
        "--zo_layers",
        "all",
        "--zo_optim",
        "sign",
        "--zo_learning_rate",
        "2e-2",
        "--zo_queries",
        "16",
    ),
}


@pytest.mark.parametrize("mix", slow_but_for(["hop-even"], list(MIXES)))
def test_alignment_moves_the_text_tower_alone_and_towards_the_statistics(mix, tmp_path):
    layers = MIXES[mix]
    before = {}

    class Before(TaskPlugin):
        def end_task(self, task, trainer):
            before.update(parameters(trainer.model))

    alignment = ClassifierAlignment(steps=30, learning_rate=2e-2, batch_size=256)
    scheduler = run(tmp_path, *layers, plugins=[Before(), alignment])
    model, after = scheduler.model, parameters(scheduler.model)
    assert after.keys() == before.keys()  # all that was trained still is
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved
    assert not [name for name in moved if "text_model" not in name]

    def loss() -> float:
        features, labels = alignment.draw(4096, seed=5)
        model.set_classes(scheduler.stream.class_names)
        with torch.no_grad():
            return float(F.cross_entropy(model.logits(features, model.encode("language")), labels))

    aligned = loss()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.copy_(before[name])
    assert aligned < loss() - 1e-3  # an adapter that is drawn anew moves little in 30 steps
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["accuracy_matrix"]) == 2


@pytest.mark.slow
def test_text_layers_that_are_zeroth_order_in_a_task_are_so_in_the_alignment(tmp_path, monkeypatch):
    splits = []
    from hf_zocl.continual.plugins import classifier_alignment as module

    class Watched(module.ZOCLTrainer):
        def train(self, *arguments, **options):
            result = super().train(*arguments, **options)
            splits.append(self.split)
            return result

    monkeypatch.setattr(module, "ZOCLTrainer", Watched)
    run(tmp_path, "--zo_branch", "dual", "--zo_layers", "hop-even", plugins=[ClassifierAlignment(2)])
    assert len(splits) == 2
    for split in splits:
        assert {(group.branch, group.layer) for group in split.zo} == {("language", 2), ("language", 4)}
        assert split.fo
        assert all("text_model" in name for name in split.fo)


@pytest.mark.slow
def test_alignment_goes_beside_activation_checkpointing(tmp_path):
    arguments = ("--classifier_alignment", "2", "--gradient_checkpointing", "true", "--max_steps", "1")
    assert build_scheduler(small_recipe(tmp_path, *arguments)).run()["last"] > 0


def test_the_recipe_turns_alignment_on(tmp_path):
    scheduler = build_scheduler(small_recipe(tmp_path, "--classifier_alignment", "7"))
    (alignment,) = scheduler.callbacks
    assert (alignment.steps, alignment.learning_rate) == (7, 5e-3)
    assert scheduler.recipe["classifier_alignment"] == 7
    assert build_scheduler(small_recipe(tmp_path)).callbacks == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--scenario", "task"), "classifier alignment: scenario='task' does not predict among all classes seen"),
        (("--frozen_parameters", "text_model"), "of which no parameter is trained here"),
    ],
)
def test_a_run_that_cannot_be_aligned_is_refused_before_any_work(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", "--classifier_alignment", "2", *arguments)
    assert not (tmp_path / "run").exists()


def test_classes_without_statistics_are_not_lost_in_silence(plain, tmp_path):
    options = ("--classifier_alignment", "2", "--model_name_or_path", str(plain / "task-02"))
    build_scheduler(small_recipe(tmp_path, *CLASSES, *options))  # all that it knows arrives again
    with pytest.raises(ValueError, match=r"knows classes that this stream lacks, such as 'cat'"):
        build_scheduler(small_recipe(tmp_path, "--class_order", "0", "1", *options))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--classifier_alignment", "-1"), "classifier_alignment=-1: expected 0 or more"),
        (
            ("--classifier_alignment_learning_rate", "0"),
            "classifier_alignment_learning_rate=0.0: expected more than 0",
        ),
    ],
)
def test_numbers_out_of_their_range_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        small_recipe(tmp_path, *arguments)
    for options in ({"steps": 0}, {"batch_size": 0}, {"learning_rate": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ClassifierAlignment(**options)
