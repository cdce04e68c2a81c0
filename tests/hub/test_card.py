import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import (
    ModelCard,
    ModelCardData,
    constants,
    eval_result_entries_to_yaml,
    metadata_load,
    parse_eval_result_entries,
)
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from hf_zocl import load_task_checkpoint
from hf_zocl.hub import seal_task_checkpoint, write_task_card
from hf_zocl.hub.card import TaskCardData, render_eval_results, render_task_card
from hf_zocl.hub.public import public_files
from hf_zocl.sample import sample_path
from tests.hub.checkpoints import put_on_hub, save_checkpoint


ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "model_cards" / "examples"


@pytest.fixture
def task() -> dict:
    return {
        "format_version": 1,
        "task": 3,
        "num_tasks": 5,
        "benchmark": "cifar10",
        "dataset": "uoft-cs/cifar10",
        "base_model": "openai/clip-vit-base-patch16",
        "base_model_is_local": False,
        "adapter": "lora",
        "classes": ["airplane", "dog", "frog", "ship", "cat", "truck"],
        "task_classes": ["cat", "truck"],
        "task_sizes": [2, 2, 2],
        "class_order": [0, 5, 6, 8, 3, 9],
        "prompt_template": "a photo of a {}.",
        "assignment": {
            "branch": "dual",
            "layers": "hop-even",
            "towers": {
                "vision": {"1": "fo", "2": "zo", "3": "fo", "4": "zo"},
                "language": {"1": "fo", "2": "zo"},
            },
        },
        "metrics": {
            "accuracy_matrix": [[0.9], [0.7, 0.8], [0.6, 0.625, 0.75]],
            "seen_accuracy": [0.9, 0.75, 0.658333],
            "last": 0.658333,
            "avg": 0.769444,
            "forgetting": 0.2375,
            "backward_transfer": -0.2375,
        },
        "zero_shot": {
            "per_task": [0.8, 0.6, 0.5, 0.4, 0.3],
            "seen_accuracy": [0.8, 0.7, 0.6, 0.5, 0.4],
            "avg": 0.6,
            "last": 0.4,
        },
        "recipe": {
            "zo_branch": "dual",
            "zo_layers": "hop-even",
            "increment": 2,
            "learning_rate": 0.001,
            "max_steps": None,
            "dataset_path": "/srv/private/data/cifar10",
            "output_dir": "/srv/private/run",
            "hub_token": "hf_secret",
        },
        "seed": 0,
        "seconds": 12.34,
        "peak_memory_bytes": 2_170_000_000,
        "versions": {"hf_zocl": "0.1.0", "torch": "2.9"},
    }


def table_rows(card: ModelCard) -> list[list[str]]:
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def code_blocks(card: ModelCard) -> tuple[str, str]:
    """How to load the checkpoint with hf_zocl, and with transformers."""
    ours, theirs = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    return ours, theirs


def test_metadata_names_base_model_dataset_and_tags(task, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(str(render_task_card(task)), encoding="utf-8")
    metadata = metadata_load(readme)
    assert metadata["library_name"] == "peft"
    assert metadata["base_model"] == "openai/clip-vit-base-patch16"
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["datasets"] == ["uoft-cs/cifar10"]
    assert metadata["tags"] == ["hf_zocl", "continual-learning", "zeroth-order-optimization", "clip", "lora"]
    assert metadata["pipeline_tag"] == "zero-shot-image-classification"
    assert metadata["license"] == "apache-2.0"


def test_model_index_holds_last_avg_and_every_task_unrounded(task):
    data = ModelCard(str(render_task_card(task))).data
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values == {
        "Last (accuracy on all classes seen)": 0.658333,
        "Avg (mean of that over the tasks)": 0.769444,
        "Task 1": 0.6,
        "Task 2": 0.625,
        "Task 3": 0.75,
    }
    assert {result.dataset_type for result in data.eval_results} == {"uoft-cs/cifar10"}
    assert data.eval_results[0].dataset_name == "cifar10, tasks 1 to 3 of 5"
    assert data.model_name == "clip-vit-base-patch16-lora-cifar10-task-03"


def test_card_is_unchanged_by_parsing_it_again(task):
    content = str(render_task_card(task))
    assert str(ModelCard(content)) == content


def test_local_base_model_and_dataset_stay_out_of_the_metadata(task):
    task |= {"base_model": "mini-clip", "base_model_is_local": True, "dataset": None}
    card = render_task_card(task)
    assert not {"base_model", "base_model_relation", "datasets"} & card.data.to_dict().keys()
    assert 'CLIPModel.from_pretrained("path/to/mini-clip")' in card.text


def test_first_order_run_is_not_tagged_zeroth_order(task):
    task["assignment"] = {
        "branch": "none",
        "layers": "all",
        "towers": {"vision": {"1": "fo"}, "language": {"1": "fo"}},
    }
    card = render_task_card(task)
    assert "zeroth-order-optimization" not in card.data.tags
    assert "first-order optimisation" in card.text


def test_layers_that_are_zeroth_order_in_part_are_said_to_be(task):
    task["assignment"]["towers"] = {"vision": {"1": "fo+zo", "2": "fo"}, "language": {"1": "fo+zo"}}
    text = " ".join(render_task_card(task).text.split())
    zeroth = "by zeroth-order (ZO) optimisation, that is by forward passes alone,"
    assert f"Of the 3 layers drawn below, 2 were trained in part {zeroth} and the others by backpropagation," in text
    assert "`ZO` zeroth-order, `fo` first-order, `mix` some of each, blank: nothing is trained there." in text


@pytest.mark.parametrize(
    "modes, said",
    [
        (["fo+zo", "fo+zo"], "All 2 layers drawn below were trained in part by ZO, and in part by backpropagation,"),
        (["zo", "fo+zo", "fo+zo"], "Of the 3 layers drawn below, 1 was trained by ZO, and the others in part,"),
        (
            ["zo", "zo", "fo+zo", "fo"],
            "Of the 4 layers drawn below, 2 were trained by ZO, 1 in part, and the others by backpropagation,",
        ),
    ],
)
def test_no_layers_are_said_to_be_backpropagated_where_there_are_none(task, modes, said):
    task["assignment"]["towers"] = {"vision": {str(number): mode for number, mode in enumerate(modes, start=1)}}
    said = said.replace("ZO,", "zeroth-order (ZO) optimisation, that is by forward passes alone,")
    assert f" The base model is frozen. {said} with `hf_zocl`" in " ".join(render_task_card(task).text.split())


def test_what_is_outside_the_numbered_layers_is_drawn_and_counted(task):
    """The last norms are all that may be zeroth-order, or trained at all."""
    task["assignment"]["towers"] = {"language": {"2": "fo", "other": "fo"}, "vision": {"other": "zo"}}
    text = " ".join(render_task_card(task).text.split())
    assert "Of the 3 layers drawn below, 1 was trained by zeroth-order (ZO) optimisation" in text
    assert "layer 1 2 other language fo fo vision ZO ```" in text
    assert "`other` is outside the numbered layers, such as the last norm." in text
    task["assignment"]["towers"] = {"language": {"other": "zo"}, "vision": {"other": "zo"}}
    text = " ".join(render_task_card(task).text.split())
    assert "All 2 layers drawn below were trained by zeroth-order (ZO) optimisation" in text
    assert "layer other language ZO vision ZO ```" in text


def test_accuracy_matrix_is_a_percent_table_with_an_empty_upper_triangle(task):
    rows = table_rows(render_task_card(task))
    start = rows.index(["after task", "task 1", "task 2", "task 3", "all seen", "zero-shot"])
    assert rows[start + 2 : start + 5] == [
        ["1", "90.0", "", "", "90.0", "80.0"],
        ["2", "70.0", "80.0", "", "75.0", "70.0"],
        ["3", "60.0", "62.5", "75.0", "65.8", "60.0"],
    ]


def test_zero_shot_is_compared_over_the_tasks_seen(task):
    rows = table_rows(render_task_card(task))
    assert ["Last: accuracy on all classes seen", "65.8", "60.0"] in rows
    assert ["Avg: mean of this accuracy over the tasks", "76.9", "70.0"] in rows


def test_forgetting_time_and_memory_are_shown(task):
    rows = table_rows(render_task_card(task))
    assert ["Forgetting", "23.8", ""] in rows
    assert ["Backward transfer", "-23.8", ""] in rows
    assert ["Time", "12.3 s", ""] in rows
    assert ["Peak memory", "2.17 GB", ""] in rows


def test_first_task_has_no_forgetting_yet(task):
    task |= {"task": 1, "classes": ["airplane", "dog"], "task_classes": ["airplane", "dog"], "task_sizes": [2]}
    task["metrics"] |= {
        "accuracy_matrix": [[0.9]],
        "seen_accuracy": [0.9],
        "last": 0.9,
        "avg": 0.9,
        "forgetting": None,
        "backward_transfer": None,
    }
    rows = table_rows(render_task_card(task))
    assert ["Forgetting", "–", ""] in rows
    assert ["1", "airplane, dog"] in rows


def test_rows_of_a_table_have_as_many_cells_and_no_blank_line_between(task):
    for block in re.findall(r"(?:^\|.*\n)+", render_task_card(task).text, re.MULTILINE):
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
        assert re.fullmatch(r"[|\-:]+", block.splitlines()[1])


def test_card_has_no_double_blank_lines_and_no_trailing_blanks(task):
    text = render_task_card(task).text
    assert "\n\n\n" not in text
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)


def test_layers_are_drawn_in_order_for_each_tower(task):
    layers = ["zo" if layer % 2 == 0 else "fo" for layer in range(1, 13)]
    # The keys of a JSON object may come sorted as text: 1, 10, 11, 12, 2.
    task["assignment"]["towers"]["vision"] = dict(sorted((str(i + 1), mode) for i, mode in enumerate(layers)))
    drawn = {line.split()[0]: line.split()[1:] for line in render_task_card(task).text.splitlines() if line.strip()}
    assert drawn["layer"] == [str(layer) for layer in range(1, 13)]
    assert drawn["vision"] == ["fo", "ZO"] * 6
    assert drawn["language"] == ["fo", "ZO"]


def test_classes_are_listed_by_task(task):
    names, sizes = [f"class{i}" for i in range(7)], [4, 2, 1]
    task |= {"classes": names, "task_classes": names[-1:], "task_sizes": sizes}
    rows = [row for row in table_rows(render_task_card(task)) if len(row) == 2 and re.match(r"class\d", row[1])]
    assert rows == [["1", "class0, class1, class2, class3"], ["2", "class4, class5"], ["3", "class6"]]


def test_local_paths_keep_their_last_component_only(task):
    task |= {"base_model": "/srv/private/models/clip", "base_model_is_local": True, "dataset": "/srv/private/images"}
    content = str(render_task_card(task))
    assert "/srv" not in content and "private" not in content
    assert ["`dataset_path`", "cifar10"] in table_rows(ModelCard(content))


def test_recipe_shows_main_arguments_and_never_a_token(task):
    card = render_task_card(task)
    rows = table_rows(card)
    assert ["`zo_layers`", "hop-even"] in rows
    assert ["`seed`", "0"] in rows
    assert "hf_secret" not in str(card) and "output_dir" not in str(card) and "max_steps" not in str(card)


def test_an_expression_that_begins_like_a_path_is_shown_whole(task):
    task["recipe"] |= {"zo_layers": r"\.layers\.1\.", "adapter_config": {"target_modules": r"\.q_proj"}}
    rows = table_rows(render_task_card(task))
    assert ["`zo_layers`", r"\\.layers\\.1\\."] in rows
    assert ["`adapter_config`", r"target_modules=\\.q_proj"] in rows


def test_class_names_cannot_break_a_table(task):
    task["classes"][1] = "dog | *hot* <b>\nbun"
    assert ["1", r"airplane, dog \| \*hot\* \<b> bun"] in table_rows(render_task_card(task))


@pytest.mark.parametrize("name", ["dog", 'child\'s "toy"', "back\\slash"])
def test_loading_code_compiles_and_lists_the_classes(task, name):
    task["classes"] = [name, *(f"class number {i}" for i in range(40)), *task["task_classes"]]
    task["task_sizes"] = [41, 0, 2]
    ours, theirs = code_blocks(render_task_card(task))
    compile(ours, "card", "exec")
    compile(theirs, "card", "exec")
    classes = re.search(r"^classes = (\[.*?\])\nclassify", theirs, re.DOTALL | re.MULTILINE).group(1)
    assert eval(classes) == task["classes"]


@pytest.mark.parametrize(("adapter", "needed"), [("lora", False), ("moe", True)])
def test_loading_code_imports_hf_zocl_for_moe_adapters_alone(task, adapter, needed):
    task["adapter"] = adapter
    assert ("import hf_zocl" in code_blocks(render_task_card(task))[1]) is needed


def test_a_card_shows_the_arguments_of_its_own_adapter_alone(task):
    task["recipe"] |= {"adapter": "moe", "moe_num_experts": 2, "lora_rank": 8}
    task["recipe"]["adapter_config"] = {"router_token": "first", "bottleneck": 8}
    task["adapter"] = "moe"
    card = str(render_task_card(task))
    assert "with MoE adapters after" in card
    assert "moe_num_experts" in card and "router_token=first, bottleneck=8" in card
    assert "lora_rank" not in card


def test_card_admits_a_model_below_zero_shot(task):
    assert "below the zero-shot" not in render_task_card(task).text
    task["metrics"]["seen_accuracy"][-1] = 0.5
    assert "below the zero-shot" in render_task_card(task).text


def test_the_card_names_the_task_that_was_forgotten_most(task):
    line = "It has forgotten: on task 1 its accuracy was 90.0 % at best and is 60.0 % now."
    assert line in render_task_card(task).text
    task["metrics"]["accuracy_matrix"][-1] = [0.9, 0.8, 0.75]
    assert "It has forgotten" not in render_task_card(task).text


def test_several_prompts_are_listed_and_the_loading_code_says_that_it_takes_the_first(task):
    task["prompt_template"] = ["a photo of a {}.", "a sketch of a {}."]
    text = str(render_task_card(task))
    assert "Prompts, whose features are averaged: `a photo of a {}.`, `a sketch of a {}.`" in text
    assert "# The first of 2 prompts; load_task_checkpoint, above, averages them all." in text


def test_prompts_of_each_dataset_are_not_said_to_be_one(task):
    task["task_prompts"] = [["a {}.", "the {}."], "a photo of a {}.", None]
    text = str(render_task_card(task))
    assert "Every dataset has prompts of its own (`task_prompts` in `task.json`)." in text
    assert "tested with the prompts of each dataset and on its test images." in text
    assert "Prompt: " not in text and "prompt above" not in text


def test_domains_are_listed_by_name_with_the_classes_they_share(task):
    task["scenario"], task["task_titles"] = "domain", ["photo", "sketch", "toy"]
    text = str(render_task_card(task))
    names = ", ".join(task["classes"])
    assert f"| 1: photo | {names} |" in text and f"| 2: sketch | {names} |" in text
    assert "tested among all classes. Prompt" in text


def test_the_metadata_is_what_the_hub_and_its_client_accept(task):
    content = str(render_task_card(task))
    block = REGEX_YAML_BLOCK.search(content).group(2)  # the Hub's own pattern
    metadata = yaml.safe_load(block)
    assert ModelCardData(**metadata, ignore_metadata_errors=False).to_dict() == metadata
    assert metadata["metrics"] == ["accuracy"]
    _, results = model_index_to_eval_results(metadata["model-index"])
    assert results == TaskCardData(task).eval_results


def test_the_card_data_are_model_card_data_without_the_task_in_them(task):
    data = TaskCardData(task)
    assert isinstance(data, ModelCardData)
    assert not {"task", "repo_id", "revision"} & data.to_dict().keys()
    assert data.title == "cifar10" and data.among == "all classes seen by then"


def test_results_per_task_are_written_as_the_hub_reads_them(task):
    ((name, content),) = render_eval_results(task).items()
    assert name == ".eval_results/cifar10.yaml"
    entries = parse_eval_result_entries(yaml.safe_load(content))
    assert eval_result_entries_to_yaml(entries) == yaml.safe_load(content)
    assert {entry.dataset_id for entry in entries} == {"uoft-cs/cifar10"}
    values = {entry.task_id: entry.value for entry in entries}
    assert values == {"all-seen": 0.658333, "average": 0.769444, "task-01": 0.6, "task-02": 0.625, "task-03": 0.75}
    assert entries[0].notes == "hf_zocl, after task 3 of 5, among all classes seen by then"
    task["recipe"]["max_test_images_per_class"] = 50
    (capped, *_) = parse_eval_result_entries(yaml.safe_load(render_eval_results(task)[name]))
    assert capped.notes == f"{entries[0].notes}, at most 50 test images of a class"


@pytest.mark.parametrize("dataset", [None, "/srv/private/images"])
def test_a_dataset_that_is_not_on_the_hub_has_no_results_file(task, dataset):
    assert render_eval_results({**task, "dataset": dataset}) == {}


def test_zero_shot_kept_is_shown_where_it_was_measured(task):
    assert "not measured: the run had no held-out dataset" in str(render_task_card(task))
    task |= {"zero_shot_retention": 0.925, "held_out": {"tiny|net": {"zero_shot": 0.4, "after": [0.39, 0.38, 0.37]}}}
    rows = table_rows(render_task_card(task))
    assert ["Zero-shot kept: accuracy on held-out datasets, relative to zero-shot", "92.5", "100.0"] in rows
    assert [r"tiny\|net", "40.0", "37.0"] in rows


@pytest.mark.parametrize("kept, shown", [(0.0, "0.0"), (None, "–")])
def test_held_out_datasets_are_not_denied_where_nothing_of_them_was_kept_or_known(task, kept, shown):
    task |= {
        "zero_shot_retention": kept,
        "held_out": {"other": {"zero_shot": 0.4 if shown == "0.0" else 0.0, "after": [0.0]}},
    }
    rows = table_rows(render_task_card(task))
    assert ["Zero-shot kept: accuracy on held-out datasets, relative to zero-shot", shown, "100.0"] in rows
    assert "had no held-out dataset" not in str(render_task_card(task))


@pytest.mark.parametrize(
    "scenario, among", [("task", "the classes of its own task"), ("cross-dataset", "the classes of its own dataset")]
)
def test_the_classes_that_were_predicted_among_are_said_everywhere(task, scenario, among):
    text = render_task_card({**task, "scenario": scenario}).text
    assert f"tested among {among}" in text and f"of each task, among {among}:" in text
    assert "seen by then" not in text and "classes of different tasks were not tested against each other" in text
    last = "mean accuracy on the datasets seen" if scenario == "cross-dataset" else "accuracy on all classes seen"
    assert f"| Last: {last} |" in text
    text = render_task_card(task).text
    assert "of each task, among all classes seen by then:" in text and "against each other" not in text


def test_what_a_run_began_with_is_not_called_its_base_model(task):
    assert "the base model before any training" in render_task_card(task).text
    task["metrics"]["seen_accuracy"][-1] = 0.1
    task["recipe"] |= {"model_name_or_path": "/srv/runs/earlier/task-05"}
    task |= {"known_classes": ["horse", "deer"]}
    text = render_task_card(task).text
    assert "The run trained the adapter of `task-05` further." in text and "/srv" not in text
    assert "the base model before any training" not in text and "of its own base model" not in text
    assert "| known before | horse, deer |" in text
    assert text.count("among all classes seen by then and 2 that were known before") == 2
    task["recipe"]["merge_into"] = "/srv/merged"
    text = render_task_card({**task, "known_classes": []}).text
    assert "The adapter of `task-05` was merged into it before the run." in text and "/srv" not in text
    assert "the base model, with that adapter merged into it, tested in the same way" in text
    assert "the base model before any training" not in text and "of its own base model" not in text


def test_a_task_that_was_not_trained_among_its_own_classes_alone_is_not_said_to_be(task):
    text = render_task_card(task).text
    assert "a task of one class" not in text and "all classes seen apart" not in text
    task |= {"task_sizes": [2, 3, 1], "recipe": {**task["recipe"], "classifier_alignment": 100}}
    text = render_task_card(task).text
    assert "(a task of one class: among all classes seen)" in text
    assert "After each task the text tower learned for 100 steps to tell all classes seen apart" in text


def test_the_loading_code_names_a_class_of_several_datasets_once(task):
    task |= {"scenario": "cross-dataset", "classes": ["cat", "dog", "frog", "ship", "cat", "truck"]}
    assert "classes = ['cat', 'dog', 'frog', 'ship', 'truck']" in code_blocks(render_task_card(task))[1]


def test_the_card_shows_the_figure_of_the_folder(task):
    assert re.search(r"!\[[^]]+\]\(accuracy_matrix\.png\)", render_task_card(task).text)


def test_a_card_for_the_hub_names_its_repository_and_revision(task):
    ours, theirs = code_blocks(render_task_card(task, repo_id="user/stream"))
    assert 'load_task_checkpoint("user/stream", revision="task-03")' in ours
    assert 'CLIPModel.from_pretrained("user/stream", adapter_kwargs={"revision": "task-03"})' in theirs
    assert "path/to" not in ours + theirs
    assert 'revision="main"' in code_blocks(render_task_card(task, "user/stream", "main"))[0]


def test_a_base_model_that_was_pushed_along_is_loaded_from_the_same_repository(task):
    for change in ({"base_model": "/srv/clip", "base_model_is_local": True}, {"base_model": "user/stream"}):
        card = render_task_card({**task, **change}, repo_id="user/stream")
        assert 'CLIPModel.from_pretrained("user/stream", revision="task-03")' in code_blocks(card)[1]
        assert "base_model" not in card.data.to_dict()
        assert "/srv" not in str(card)


@pytest.mark.parametrize("adapter", ["lora", "moe"])
def test_the_loading_code_of_a_folder_runs_and_names_the_same_class(run_code, tmp_path, adapter):
    folder = save_checkpoint(tmp_path, adapter=adapter)
    expected = load_task_checkpoint(folder)[0].predict(tmp_path / "image.png")[0]
    places = {"path/to/this/checkpoint": folder, "path/to/mini-clip": sample_path("mini-clip")}
    assert run_code(folder, places) == expected * 2


@pytest.mark.parametrize("base_model", ["user/base", "user/stream"])
def test_the_loading_code_of_a_repository_runs_and_names_the_same_class(run_code, tmp_path, base_model, monkeypatch):
    folder = save_checkpoint(tmp_path)
    expected = load_task_checkpoint(folder)[0].predict(tmp_path / "image.png")[0]
    put_on_hub(tmp_path / "hub", "user/base", main=sample_path("mini-clip"))
    push(folder, "user/stream", base_model, tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run_code(folder) == expected * 2


@pytest.fixture
def run_code(tmp_path, monkeypatch, capsys):
    """Runs the code of a checkpoint's card beside an `image.png`, and gives the classes that it prints."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)

    def run(folder: Path, places: dict[str, Path] | None = None) -> list[str]:
        printed = []
        for source in code_blocks(ModelCard.load(folder / "README.md")):
            for placeholder, path in (places or {}).items():
                source = source.replace(placeholder, str(path))
            exec(source, {})
            printed.append(capsys.readouterr().out)
        ours, theirs = printed
        return [ours.split()[0], eval(theirs)["label"]]

    return run


def push(folder: Path, repository: str, base_model: str, cache: Path) -> None:
    """A repository whose base model is another one, or lies beside the adapter."""
    for name in ("task.json", "adapter_config.json"):
        content = json.loads((folder / name).read_text())
        key = "base_model" if name == "task.json" else "base_model_name_or_path"
        content[key] = base_model
        if name == "task.json":
            content["base_model_is_local"] = False
            write_task_card(folder, content, repository)
        (folder / name).write_text(json.dumps(content))
    if base_model == repository:
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(sample_path("mini-clip") / name, folder / name)
    seal_task_checkpoint(folder)
    put_on_hub(cache, repository, main=folder, task_03=folder)


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ({"vision": 1, "language": 8}, "vision=1, language=8"),
        ({"vision": "auto", "language": 0.001}, "vision=auto, language=0.001"),
        ({"vision": {"zo": 1}}, "vision=zo=1"),
        ({"language": "/srv/private/x"}, "language=x"),
        ("vision=1,language=8", "vision=1,language=8"),
        (4, "4"),
    ],
)
def test_a_value_for_each_tower_reads_as_on_the_command_line(task, value, cell):
    task["recipe"]["zo_queries"] = value
    assert f"\n| `zo_queries` | {cell} |\n" in str(render_task_card(task))


@pytest.mark.parametrize("folder", sorted(path for path in EXAMPLES.iterdir() if path.is_dir()), ids=lambda p: p.name)
def test_an_example_is_what_the_template_makes_of_its_run(folder):
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    content = (folder / "README.md").read_text(encoding="utf-8")
    assert content == str(render_task_card(task))
    assert (folder / "accuracy_matrix.png").read_bytes().startswith(b"\x89PNG")
    metadata = metadata_load(folder / "README.md")
    _, results = model_index_to_eval_results(metadata["model-index"])
    assert [result.metric_value for result in results][:2] == [task["metrics"]["last"], task["metrics"]["avg"]]
    for name, expected in render_eval_results(task).items():
        assert (folder / name).read_text(encoding="utf-8") == expected


def test_a_row_of_the_gallery_is_on_the_card_where_the_checkpoint_has_one(task):
    assert "gallery" not in str(render_task_card(task))
    card = str(render_task_card({**task, "gallery": {"task": 1, "images": 8, "forgotten": 3}}))
    assert "](gallery.png)" in card and "8 test images of task 1" in card and "the first 3 right" in card
    assert "the first" not in str(render_task_card({**task, "gallery": {"task": 1, "images": 8, "forgotten": 0}}))


def test_a_picture_that_was_removed_is_not_pushed_and_not_on_the_card(task, tmp_path):
    folder = save_checkpoint(tmp_path)
    info = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    info["gallery"] = {"task": 1, "images": 8, "forgotten": 3}
    (folder / "task.json").write_text(json.dumps(info), encoding="utf-8")
    (folder / "gallery.png").write_bytes(b"a picture")
    seal_task_checkpoint(folder)
    files = public_files(folder, "user/repo")
    assert files["gallery.png"] == folder / "gallery.png" and b"](gallery.png)" in files["README.md"]
    (folder / "gallery.png").unlink()
    files = public_files(folder, "user/repo")
    assert "gallery.png" not in files and b"gallery" not in files["README.md"] + files["task.json"]


def test_the_examples_name_no_place_of_the_machine_they_ran_on():
    for file in EXAMPLES.rglob("*.*"):
        if file.suffix in (".md", ".json", ".yaml"):
            assert not re.search(r'["\s(]/\w|[A-Z]:\\|~/', file.read_text(encoding="utf-8")), file


def test_plugins_are_named_unless_the_recipe_says_what_they_did(task):
    task["plugins"] = ["ClassifierAlignment", "Mine"]
    assert "took part in every task: `ClassifierAlignment`, `Mine`." in str(render_task_card(task))
    task["recipe"]["classifier_alignment"] = 100
    card = str(render_task_card(task))
    assert "learned for 100 steps" in card and "took part in every task: `Mine`." in card
