import re

import pytest
from huggingface_hub import ModelCard, metadata_load

from hf_zocl.hub.model_card import render_task_card


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
                "language": {"1": "fo", "2": "zo", "3": "frozen"},
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


def code_block(card: ModelCard) -> str:
    return re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)


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


def test_model_index_holds_last_and_avg_unrounded(task):
    data = ModelCard(str(render_task_card(task))).data
    assert [result.metric_value for result in data.eval_results] == [0.658333, 0.769444]
    assert [result.metric_name.split()[0] for result in data.eval_results] == ["Last", "Avg"]
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
    assert 'BASE_MODEL = "path/to/mini-clip"' in card.text


def test_first_order_run_is_not_tagged_zeroth_order(task):
    task["assignment"] = {
        "branch": "none",
        "layers": "all",
        "towers": {"vision": {"1": "fo"}, "language": {"1": "fo"}},
    }
    card = render_task_card(task)
    assert "zeroth-order-optimization" not in card.data.tags
    assert "first-order optimisation" in card.text


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
    assert ["Avg: mean of that over the tasks", "76.9", "70.0"] in rows


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
    assert drawn["language"] == ["fo", "ZO", "--"]


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


def test_class_names_cannot_break_a_table(task):
    task["classes"][1] = "dog | *hot* <b>\nbun"
    assert ["1", r"airplane, dog \| \*hot\* \<b> bun"] in table_rows(render_task_card(task))


@pytest.mark.parametrize("name", ["dog", 'child\'s "toy"', "back\\slash"])
def test_loading_code_compiles_and_lists_the_classes(task, name):
    task["classes"] = [name, *(f"class number {i}" for i in range(40)), *task["task_classes"]]
    task["task_sizes"] = [41, 0, 2]
    source = code_block(render_task_card(task))
    compile(source, "card", "exec")
    classes = re.search(r"^classes = (\[.*?\])\nprompts", source, re.DOTALL | re.MULTILINE).group(1)
    assert eval(classes) == task["classes"]


@pytest.mark.parametrize(("adapter", "needed"), [("lora", False), ("moe", True)])
def test_loading_code_imports_hf_zocl_for_moe_adapters_alone(task, adapter, needed):
    task["adapter"] = adapter
    assert ("import hf_zocl" in code_block(render_task_card(task))) is needed


def test_a_card_shows_the_arguments_of_its_own_adapter_alone(task):
    task["recipe"] |= {"adapter": "moe", "moe_num_experts": 2, "moe_router_token": "first", "lora_rank": 8}
    task["adapter"] = "moe"
    card = str(render_task_card(task))
    assert "with MoE adapters after" in card
    assert "moe_num_experts" in card and "moe_router_token" in card
    assert "lora_rank" not in card


def test_card_admits_a_model_below_zero_shot(task):
    assert "below the zero-shot" not in render_task_card(task).text
    task["metrics"]["seen_accuracy"][-1] = 0.5
    assert "below the zero-shot" in render_task_card(task).text


def test_several_prompts_are_listed_and_the_loading_code_says_that_it_takes_the_first(task):
    task["prompt_template"] = ["a photo of a {}.", "a sketch of a {}."]
    text = str(render_task_card(task))
    assert "Prompts, whose features are averaged: `a photo of a {}.`, `a sketch of a {}.`" in text
    assert "# The first of 2 prompts; load_task_checkpoint, below, averages them all." in text


def test_domains_are_listed_by_name_with_the_classes_they_share(task):
    task["scenario"], task["task_titles"] = "domain", ["photo", "sketch"]
    text = str(render_task_card(task))
    names = ", ".join(task["classes"])
    assert f"| 1: photo | {names} |" in text and f"| 2: sketch | {names} |" in text
    assert "tested among all classes. Prompt" in text
