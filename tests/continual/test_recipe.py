"""Recipes and the command line: what they are read as, and how they fail before any work."""

import re
from pathlib import Path

import datasets
import pytest
from PIL import Image as PILImage

import hf_zocl.commands
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.continual.run_arguments import build_stream
from hf_zocl.data.benchmarks import BENCHMARKS


RECIPES = Path(hf_zocl.commands.__file__).parent / "recipes"


def recipe_file(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def parse(tmp_path: Path, text: str = "", *arguments: str):
    recipe = recipe_file(tmp_path, f"output_dir: {tmp_path / 'run'}\nreport_to: none\n{text}")
    return parse_recipe(["--recipe", str(recipe), *arguments])


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_parses_and_says_how_to_launch_it(file):
    assert parse_recipe(["--recipe", str(file)]).training.output_dir.startswith("runs/")
    assert f"accelerate launch -m hf_zocl train --recipe {file.stem}" in file.read_text(encoding="utf-8")


def save_like_the_hub(name: str, folder: Path) -> Path:
    """A dataset with the splits and columns that the benchmark's Hub copy has."""
    benchmark, classes = BENCHMARKS[name], {"cifar100": 100}.get(name, 200)
    wnids = [f"n{label:08}" for label in range(classes)] * 5
    columns = {benchmark.image_column: ([PILImage.new("RGB", (2, 2))] * len(wnids), datasets.Image())}
    labels = datasets.ClassLabel(names=wnids[:classes])
    if getattr(benchmark, "name_column", None):
        columns[benchmark.name_column] = ([f"name_{wnid}" for wnid in wnids], datasets.Value("string"))
        labels = datasets.Value("string")
    columns[benchmark.label_column] = (wnids, labels)
    features = datasets.Features({column: feature for column, (_, feature) in columns.items()})
    data = datasets.Dataset.from_dict({column: rows for column, (rows, _) in columns.items()}, features=features)
    (folder / "data").mkdir()
    for split in {benchmark.train_split, benchmark.test_split}:
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*_moe.yaml")), ids=lambda file: file.stem)
def test_the_moe_recipes_are_the_baselines_and_build_their_streams(file, tmp_path, monkeypatch):
    recipe = parse_recipe(["--recipe", str(file), "--dataset_path", str(tmp_path)])
    training, adapter = recipe.training, recipe.adapter
    assert (adapter.adapter, adapter.moe_num_experts, adapter.moe_top_k) == ("moe", 2, 2)
    assert adapter.adapter_config == {"bottleneck": 64, "scale": 0.1, "router_token": "first"}
    assert (training.learning_rate, training.weight_decay, training.warmup_steps) == (1e-3, 0.0, 30)
    assert (training.num_train_epochs, training.lr_scheduler_type) == (1, "cosine")
    assert training.per_device_train_batch_size == (128 if recipe.run.benchmark == "cifar100" else 64)
    if recipe.run.benchmark not in BENCHMARKS:
        pytest.skip(f"there is no benchmark {recipe.run.benchmark} yet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_like_the_hub(recipe.run.benchmark, tmp_path)
    stream, template = build_stream(recipe.run)
    increment = int(re.search(r"inc(\d+)", file.stem).group(1))
    classes = 100 if recipe.run.benchmark == "cifar100" else 200
    assert [len(task.class_ids) for task in stream] == [increment] * (classes // increment)
    assert template == "a bad photo of a {}."


def test_the_command_line_overrides_the_recipe(tmp_path):
    recipe = parse(tmp_path, "zo_branch: vision\nlora_rank: 4\n", "--zo_branch", "language", "--seed", "7")
    assert (recipe.training.zo_branch, recipe.adapter.lora_rank, recipe.training.seed) == ("language", 4, 7)


def test_lists_and_numbers_are_read_from_yaml_and_from_the_command_line(tmp_path):
    assert parse(tmp_path, "zo_layers: [2, 4]\nclass_order: [3, 1, 0, 2]\n").training.zo_layers == [2, 4]
    assert parse(tmp_path, "", "--zo_layers", "2", "4").training.zo_layers == [2, 4]
    assert parse(tmp_path, "", "--zo_layers", "suffix-2").training.zo_layers == "suffix-2"
    assert parse(tmp_path, "zo_learning_rate: 1e-3\n").training.zo_learning_rate == 1e-3


def test_a_misspelt_key_is_named_with_the_likely_one(tmp_path):
    with pytest.raises(
        ValueError, match=r"recipe.yaml, line 3: unknown argument 'zo_brunch'. Did you mean 'zo_branch'"
    ):
        parse(tmp_path, "zo_brunch: dual\n")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.yaml: there is no such file"):
        parse_recipe(["--recipe", str(tmp_path / "nowhere.yaml")])


def test_a_recipe_is_asked_for_by_name_or_by_path_and_an_unknown_one_lists_the_names(tmp_path):
    by_name = parse_recipe(["--recipe", "quickstart"]).to_dict()
    in_a_checkout = Path(__file__).resolve().parents[2] / "scripts" / "recipes" / "quickstart.yaml"
    assert parse_recipe(["--recipe", str(in_a_checkout)]).to_dict() == by_name
    names = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
    with pytest.raises(ValueError, match=f"--recipe quickstrat: .* one of {names}"):
        parse_recipe(["--recipe", "quickstrat"])
    with pytest.raises(ValueError, match=f"recipe.yaml, line 3: include='quickstrat': .* one of {names}"):
        parse(tmp_path, "include: quickstrat\n")


def test_a_name_of_the_packages_is_not_shadowed_by_a_file_and_can_be_included(tmp_path, monkeypatch):
    (tmp_path / "quickstart").write_text("lora_rank: 3\n")
    monkeypatch.chdir(tmp_path)
    assert parse_recipe(["--recipe", "quickstart"]).adapter.lora_rank == 8
    assert parse_recipe(["--recipe", "./quickstart", "--output_dir", "run"]).adapter.lora_rank == 3
    included = parse(tmp_path, "include: quickstart\nzo_branch: language\n")
    assert (included.training.zo_branch, included.adapter.lora_rank) == ("language", 8)


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a mapping"):
        parse_recipe(["--recipe", str(recipe_file(tmp_path, "- zo_branch"))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dtype: float8", "dtype='float8' is unknown"),
        ("zo_branch: both", "zo_branch='both' is unknown"),
        ("zo_layers: hop-evn", "zo_layers='hop-evn' is unknown"),
        ("zo_eps: 0", "zo_eps=0"),
        ("zo_estimator: fzoo", "zo_queries=1"),
        ("adapter: lorra", "adapter='lorra' is unknown"),
        ("benchmark: none", "exactly one of dataset_name .* and datasets"),
        ("benchmark: none\ndatasets: [a, b]\nlearning: joint", "learning=joint has one task; datasets="),
        ("benchmark: none\ndatasets: [a, b]\nclass_names: [cat]", "class_names is for a single dataset"),
        ("dataset_name: someone/something", "dataset_name='someone/something' goes with benchmark=none"),
        ("learning: none\npush_to_hub: true", "push_to_hub=True: learning=none trains nothing"),
    ],
)
def test_bad_values_are_named_when_the_recipe_is_read(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zo_layers: prefix-5", "language tower, which has 4 layers"),
        ("benchmark: cifar-10", "benchmark='cifar-10' is not registered. Did you mean 'cifar10'"),
        ("increment: 11", "increment=11"),
        ("prompt_template: a photo", "prompt_template='a photo'"),
        ("push_to_hub: true\nhub_model_id: a//b", "hub_model_id=.a//b.: expected name or user/name"),
        ("eval_strategy: epoch", "eval_strategy"),
        (
            "bf16_full_eval: true\nuse_cpu: true",
            "bf16_full_eval and fp16_full_eval would leave the weights in half precision",
        ),
        ("benchmark: mtil\nprompt_template: a {}.", "every dataset of benchmark 'mtil' has prompts of its own"),
    ],
)
def test_what_does_not_fit_fails_before_training(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        build_scheduler(parse(tmp_path, text))
    assert not (tmp_path / "run").exists()


def test_an_increment_that_does_not_divide_makes_a_smaller_last_task(tmp_path, caplog):
    stream, _ = build_stream(parse(tmp_path, "increment: 4\ninitial_increment: 4\n").run)
    assert [len(task.class_ids) for task in stream] == [4, 4, 2]
    assert "2" in caplog.text


def test_any_image_classification_dataset_is_a_stream(tmp_path):
    features = datasets.Features(
        {"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["tea_pot", "mug", "jug"])}
    )
    folder = tmp_path / "pots"
    for split, colour in (("train", "red"), ("test", "blue")):
        rows = {"photo": [PILImage.new("RGB", (8, 8), colour)] * 6, "kind": [0, 1, 2] * 2}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    text = f"benchmark: none\ndataset_path: {folder}\nincrement: 1\nclass_order: [2, 0, 1]\n"
    stream, template = build_stream(parse(tmp_path, text).run)
    assert stream.class_names == ("jug", "tea pot", "mug")
    assert template == "a photo of a {}."


def test_a_revision_of_the_dataset_is_what_is_loaded_from_the_hub(tmp_path, monkeypatch):
    asked = {}

    def load_dataset(path, name, revision):
        asked.update(path=path, revision=revision)
        raise OSError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run = parse_recipe(["--output_dir", str(tmp_path), "--benchmark", "cifar10", "--dataset_revision", "v1"]).run
    with pytest.raises(ValueError, match="no network here"):
        build_stream(run)
    assert asked == {"path": "uoft-cs/cifar10", "revision": "v1"}


def test_a_dataset_of_ones_own_needs_an_increment(tmp_path):
    with pytest.raises(ValueError, match="needs increment"):
        build_stream(parse(tmp_path, f"benchmark: none\ndataset_path: {tmp_path}\n").run)


def test_a_recipe_includes_another_and_overrides_it(tmp_path):
    (tmp_path / "base.yaml").write_text("zo_branch: vision\nseed: 3\n")
    recipe = parse(tmp_path, "include: base.yaml\nseed: 4\n")
    assert (recipe.training.zo_branch, recipe.training.seed) == ("vision", 4)


def test_a_recipe_that_includes_itself_is_an_error(tmp_path):
    (tmp_path / "base.yaml").write_text("include: recipe.yaml\n")
    with pytest.raises(ValueError, match="base.yaml, line 1: include='recipe.yaml' includes itself"):
        parse(tmp_path, "include: base.yaml\n")


def test_the_bounds_of_cifar10_are_recipes_of_their_own():
    joint, zero_shot = (
        parse_recipe(["--recipe", str(RECIPES / f"cifar10_{name}.yaml")]).run for name in ("joint", "zero_shot")
    )
    assert (joint.benchmark, joint.learning, zero_shot.learning) == ("cifar10", "joint", "none")


def test_seeds_make_a_recipe_each_with_a_folder_of_its_own(tmp_path):
    recipes = parse(tmp_path, "seeds: 1993,1996,1997\nvary_class_order: true\n").per_seed()
    assert [recipe.training.seed for recipe in recipes] == [1993, 1996, 1997]
    assert [Path(recipe.training.output_dir).name for recipe in recipes] == ["seed-1993", "seed-1996", "seed-1997"]
    assert [recipe.run.class_order_seed for recipe in recipes] == [1993, 1996, 1997]
    assert recipes[0].to_dict()["seeds"] is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vary_class_order: true\nseed: 7\n", "vary_class_order=True needs seeds or num_seeds"),
        (
            "vary_class_order: true\nseeds: 1,2\nclass_order: [1, 0]\n",
            "vary_class_order=True and class_order were",
        ),
    ],
)
def test_a_class_order_that_cannot_vary_is_refused(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        parse(tmp_path, text).per_seed()


def test_a_number_of_seeds_counts_up_from_the_seed(tmp_path):
    recipes = parse(tmp_path, "num_seeds: 3\nseed: 5\n").per_seed()
    assert [(recipe.training.seed, recipe.run.class_order_seed) for recipe in recipes] == [
        (5, None),
        (6, None),
        (7, None),
    ]


def test_without_seeds_the_recipe_is_the_only_one(tmp_path):
    recipe = parse(tmp_path)
    assert recipe.per_seed() == [recipe]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('seeds: "1,two"', "seeds='1,two': expected whole numbers"),
        ('seeds: "1,1"', "expected at least one, and none twice"),
        ("num_seeds: 0", "expected at least one"),
        ('seeds: "1,2"\nnum_seeds: 2', "both given"),
    ],
)
def test_what_is_no_list_of_seeds_is_an_error(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, text)
