"""MoE adapters over a stream of tasks: a router for every task, and experts that stay as they are."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_zocl import load_task_checkpoint
from hf_zocl.commands.recipe import Recipe, build_scheduler, parse_recipe
from hf_zocl.continual.scheduler import ContinualTaskScheduler
from hf_zocl.models.moe_adapter.layer import MoEAdapter
from hf_zocl.zo.assignment import locate
from tests.helpers import image_batch, small_clip


pytestmark = pytest.mark.usefixtures("quick_pictures")


def recipe(output_dir: Path) -> Recipe:
    """Three tasks of two classes; vision first-order, language zeroth-order."""
    options = {
        "output_dir": output_dir,
        "model_name_or_path": small_clip(),
        "adapter": "moe",
        "moe_num_experts": 5,
        "moe_router_per_task": "true",
        "adapter_config": '{"freeze_experts":2}',
        "class_order": "3 8 0 1 2 4",
        "partial_order": "true",
        "increment": 2,
        "max_train_images_per_class": 16,
        "max_test_images_per_class": 5,
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "zo_branch": "language",
        "zo_layers": "all",
        "zo_learning_rate": 1e-2,
        "zo_sign": "true",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": "true",
    }
    return parse_recipe([part for name, value in options.items() for part in (f"--{name}", *str(value).split())])


def adapters(model: nn.Module) -> dict[str, MoEAdapter]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoEAdapter)}


class Watch(TrainerCallback):
    """Keeps the routers and the frozen experts as they were when each task began."""

    def __init__(self, model: nn.Module):
        self.model, self.kept = model, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.kept.append({})
        for name, adapter in adapters(self.model).items():
            frozen = tuple(f"experts.{number}." for number in torch.nonzero(adapter.frozen)[:, 0].tolist())
            for inner, parameter in adapter.named_parameters():
                if inner.startswith((*frozen, "routers.")):
                    self.kept[-1][f"{name}.{inner}"] = parameter.detach().clone()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, ContinualTaskScheduler, list[dict[str, torch.Tensor]]]:
    output_dir = tmp_path_factory.mktemp("run")
    scheduler = build_scheduler(recipe(output_dir))
    watch = Watch(scheduler.model)
    scheduler.callbacks.append(watch)
    scheduler.run()
    return output_dir, scheduler, watch.kept


@pytest.mark.slow
def test_frozen_experts_stay_bit_identical_in_both_towers(run):
    _, scheduler, kept = run
    final = dict(scheduler.model.named_parameters())
    assert not [name for name in kept[0] if ".experts." in name]
    for began in kept[1:]:
        frozen = [name for name in began if ".experts." in name]
        assert {locate(name)[0] for name in frozen} == {"vision", "language"}
        assert all(torch.equal(began[name], final[name]) for name in frozen)
    assert all(2 <= adapter.frozen.sum() <= 5 for adapter in adapters(scheduler.model).values())


def test_the_router_of_an_earlier_task_stays_bit_identical(run):
    _, scheduler, kept = run
    final = dict(scheduler.model.named_parameters())
    for task, router in ((1, ".routers.0."), (2, ".routers.1.")):
        names = [name for name in final if router in name]
        assert all(torch.equal(kept[task][name], final[name]) for name in names)
        moved = {locate(name)[0] for name in names if not torch.equal(kept[task - 1][name], final[name])}
        assert moved == {"vision", "language"}


@pytest.mark.parametrize("task", [1, 3])
def test_a_checkpoint_knows_its_tasks_router_and_frozen_experts(run, task):
    loaded, _ = load_task_checkpoint(run[0] / f"task-{task:02d}")
    assert all(int(adapter.task) == adapter._router + 1 == task for adapter in adapters(loaded).values())
    assert all(adapter.frozen.any() for adapter in adapters(loaded).values())


def test_load_task_checkpoint_gives_the_same_logits_to_the_last_bit(run):
    images = image_batch()["pixel_values"]
    loaded, _ = load_task_checkpoint(run[0] / "task-03")
    model = run[1].model.eval()
    model.set_classes(loaded.class_names)
    assert torch.equal(loaded(images).logits, model(images).logits)


@pytest.mark.slow
def test_a_stream_resumes_with_its_routers_and_frozen_experts(run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(run[0], output_dir)
    stopped = json.loads((output_dir / "results.json").read_text())
    for name in ("accuracy_matrix", "seen_accuracy"):
        stopped[name] = stopped[name][:1]
    (output_dir / "results.json").write_text(json.dumps(stopped))
    for task in ("task-02", "task-03"):
        shutil.rmtree(output_dir / task)
    resumed = build_scheduler(recipe(output_dir))
    resumed.run(resume=True)
    for (name, mine), theirs in zip(
        resumed.model.clip.state_dict().items(), run[1].model.clip.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_the_card_knows_the_adapter(run):
    card = (run[0] / "task-01" / "README.md").read_text()
    assert "with MoE adapters after" in card
    assert "import hf_zocl" in card
    assert "freeze_experts=2" in card
    assert "lora_rank" not in card
