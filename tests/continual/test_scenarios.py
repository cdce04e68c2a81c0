"""What is predicted among what, by scenario: in streams, and in small runs."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from hf_zocl.commands import train
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.continual.run_arguments import RunArguments, build_held_out, build_stream
from hf_zocl.data.stream import TaskStream
from hf_zocl.report import format_results
from tests.helpers import slow_but_for, small_clip


pytestmark = pytest.mark.usefixtures("quick_pictures")
NAMES = ["cat", "dog", "ship", "deer"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def split(names=NAMES, domains=("photo", "sketch"), images: int = 3, seed: int = 0) -> Dataset:
    """So many images of every class and domain."""
    rng = np.random.default_rng(seed)
    cells = [(label, domain) for domain in domains for label in range(len(names)) for _ in range(images)]
    rows = {
        "image": [PILImage.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in cells],
        "label": [label for label, _ in cells],
        "domain": [domain for _, domain in cells],
    }
    return Dataset.from_dict(
        rows, Features({"image": Image(), "label": ClassLabel(names=names), "domain": Value("string")})
    )


def dataset(**options) -> DatasetDict:
    return DatasetDict(train=split(**options), test=split(**options, seed=1))


def stream(data=None, **options) -> TaskStream:
    return TaskStream.from_dataset(data or dataset(), **{"increment": 2, "class_order_seed": None, **options})


def save(folder: Path, **options) -> Path:
    folder.mkdir()
    for name, data in dataset(**options).items():
        data.to_parquet(str(folder / f"{name}.parquet"))
    return folder


def asked(evaluation) -> tuple:
    return [task.index for task in evaluation.tasks], evaluation.class_names, evaluation.first_label


def test_class_incremental_predicts_among_all_classes_seen():
    tasks = stream()
    assert [asked(one) for one in tasks.evaluations(1)] == [([1], ("cat", "dog"), 0)]
    assert [asked(one) for one in tasks.evaluations(2)] == [([1, 2], tuple(NAMES), 0)]
    assert [asked(one) for one in tasks.future_evaluations(1)] == [([2], tuple(NAMES), 0)]


def test_task_incremental_predicts_among_the_tasks_own_classes():
    tasks = stream(scenario="task")
    expected = [([1], ("cat", "dog"), 0), ([2], ("ship", "deer"), 2)]
    assert [asked(one) for one in tasks.evaluations(2)] == expected
    assert [asked(one) for one in tasks.future_evaluations(1)] == expected[1:]


def test_domains_are_a_columns_values_and_share_their_classes():
    tasks = stream(scenario="domain", domain_column="domain")
    assert [task.title for task in tasks] == ["photo", "sketch"]
    assert [len(task.train) for task in tasks] == [12, 12]
    assert tasks.class_names == tuple(NAMES) and tasks.seen_class_names(1) == tuple(NAMES)
    assert [task.first_label for task in tasks] == [0, 0]
    assert [asked(one) for one in tasks.evaluations(2)] == [([1], tuple(NAMES), 0), ([2], tuple(NAMES), 0)]
    assert tasks[1].train_rows.tolist() == list(range(12, 24))


def test_domains_are_datasets_with_the_same_classes_whatever_their_label_ids():
    other = dataset(names=NAMES[::-1])
    parts = [stream(data, increment="all", name=name) for name, data in (("a", dataset()), ("b", other))]
    tasks = TaskStream.from_streams(parts, "both", scenario="domain")
    assert [task.title for task in tasks] == ["a", "b"]
    assert [task.arrival_labels.tolist() for task in tasks] == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert {task.class_names for task in tasks} == {tuple(NAMES)}


def test_domains_of_other_classes_are_an_error_that_names_them():
    parts = [stream(dataset(names=names), increment="all") for names in (NAMES, [*NAMES[:3], "frog"])]
    with pytest.raises(ValueError, match="must have the same classes; only one of them has 'deer', 'frog'"):
        TaskStream.from_streams(parts, "both", scenario="domain")


def test_a_domain_that_lacks_a_class_is_an_error_that_names_both():
    data = dataset()
    data["test"] = data["test"].filter(lambda row: not (row["domain"] == "sketch" and row["label"] == 1))
    with pytest.raises(ValueError, match="split 'test of domain sketch' has no image of 1 classes: 'dog'"):
        stream(data, scenario="domain", domain_column="domain")


def test_an_image_without_a_domain_is_named():
    data = dataset()
    domains = ["photo", None, *data["test"]["domain"][2:]]
    data["test"] = data["test"].remove_columns("domain").add_column("domain", domains)
    with pytest.raises(ValueError, match="'test': 1 of .* images have no domain in domain_column='domain'.* row 1"):
        stream(data, scenario="domain", domain_column="domain")


def test_a_domain_label_that_stands_for_none_is_named():
    data = dataset()
    kinds = ClassLabel(names=["sketch", "photo"])
    for name in data:
        domains = [("sketch", "photo").index(domain) for domain in data[name]["domain"]]
        domains[1] = -1 if name == "test" else domains[1]
        data[name] = data[name].remove_columns("domain").add_column("domain", domains, feature=kinds)
    with pytest.raises(ValueError, match="'test', row 1: domain -1 in domain_column='domain' is outside its 2 names"):
        stream(data, scenario="domain", domain_column="domain", label_column="label")


@pytest.mark.parametrize("options", [{"scenario": "domain"}, {"domain_column": "domain"}])
def test_a_domain_needs_its_column_and_the_other_way_round(options):
    with pytest.raises(ValueError, match="expected both 'domain' and a column"):
        stream(**options)


def test_an_unknown_scenario_is_an_error():
    with pytest.raises(ValueError, match="scenario='open' is unknown: expected one of class, task, domain"):
        stream(scenario="open")


def test_datasets_as_tasks_have_classes_of_their_own():
    parts = [stream(dataset(names=names), increment="all") for names in (NAMES, ["frog", "truck"])]
    tasks = TaskStream.from_streams(parts, "two")
    assert tasks.class_names == (*NAMES, "frog", "truck")
    assert [asked(one) for one in tasks.evaluations(2)] == [([1], tuple(NAMES), 0), ([2], ("frog", "truck"), 4)]
    assert tasks[1].arrival_labels.tolist() == [4, 5]


def test_a_dataset_in_several_tasks_cannot_be_one_task():
    with pytest.raises(ValueError, match="every dataset must be one task"):
        TaskStream.from_streams([stream(), stream()], "two")


# Runs

OPTIONS = "--per_device_train_batch_size 8 --max_steps 1 --zo_branch language --report_to none --save_strategy no"
OPTIONS += " --disable_tqdm true --logging_steps 1 --image_cache_gb 0.1"


def run(output_dir: Path, *arguments: str) -> dict:
    options = ["--output_dir", str(output_dir), "--model_name_or_path", small_clip(), *OPTIONS.split()]
    recipe = parse_recipe([*options, *arguments])
    results = build_scheduler(recipe).run(train=recipe.run.learning != "none")
    assert json.loads((output_dir / "results.json").read_text()) == json.loads(json.dumps(results))
    return results


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    return [str(save(folder / "animals")), str(save(folder / "more", names=["frog", "truck", "horse"]))]


def arguments(local: list[str], scenario: str) -> list[str]:
    if scenario == "cross-dataset":
        return ["--benchmark", "none", "--datasets", *local]
    options = ["--benchmark", "none", "--dataset_path", local[0], "--scenario", scenario]
    return [*options, *(["--domain_column", "domain"] if scenario == "domain" else ["--increment", "2"])]


@pytest.mark.parametrize(
    ("scenario", "classes"),
    slow_but_for(
        [("domain", [4, 4]), ("cross-dataset", [4, 3])],
        [("class", [2, 4]), ("task", [2, 2]), ("domain", [4, 4]), ("cross-dataset", [4, 3])],
    ),
)
def test_every_scenario_runs_and_its_results_say_what_was_measured(scenario, classes, local, tmp_path):
    results = run(tmp_path / "run", *arguments(local, scenario), "--evaluate_future", "true")
    assert results["scenario"] == scenario
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2]
    assert [len(row) for row in results["future_accuracy"]] == [1, 0]
    assert [len(row) for row in results["zero_shot"]["accuracy_matrix"]] == [1, 2]
    assert results["forward_transfer"] == pytest.approx(
        results["future_accuracy"][0][0] - results["zero_shot"]["per_task"][1]
    )
    seen = {"class": [2, 4], "task": [2, 4], "domain": [4, 4], "cross-dataset": [4, 7]}[scenario]
    assert [len(detail["per_class_accuracy"]) for detail in results["details"]] == seen
    assert all(0 <= detail["calibration_error"] <= 1 for detail in results["details"])
    names = {"loss", "zo_variance_language", "zo_variance_language_layer_2"}
    assert [set(entry) >= names for entry in results["training"]] == [True, True]
    assert ("mtil" in results) == (scenario == "cross-dataset")


@pytest.mark.slow
def test_what_training_leaves_as_it_is_has_no_forward_transfer(local, tmp_path):
    still = "--learning_rate 0 --zo_learning_rate 0 --initial_increment 2 --increment 1 --evaluate_future true"
    results = run(tmp_path / "run", "--benchmark", "none", "--dataset_path", local[0], *still.split())
    assert [len(row) for row in results["future_accuracy"]] == [2, 1, 0]
    assert results["forward_transfer"] == 0.0


def test_mtils_last_is_the_mean_over_datasets(local, tmp_path):
    results = run(tmp_path / "run", *arguments(local, "cross-dataset"))
    assert results["mtil"]["last"] == pytest.approx(np.mean(results["accuracy_matrix"][-1]))
    assert results["last"] == results["mtil"]["last"]
    assert results["mtil"]["transfer"] == results["future_accuracy"][0][0]
    assert results["tasks"] == ["animals", "more"]


def test_what_only_some_runs_measure_is_in_the_closing_table(local, tmp_path):
    results = run(tmp_path / "run", *arguments(local, "cross-dataset"))
    text = format_results({**results, "zero_shot_retention": 0.5, "skipped_images": 3})
    for line in ("forward transfer", "MTIL Transfer", "MTIL Avg"):
        assert re.search(rf"^{line} +-?[\d.]+ (points|%)$", text, re.MULTILINE)
    assert "kept on held-out  50.0 % of zero-shot" in text and "images left out   3" in text


def test_datasets_as_domains_run_from_the_command_line(local, tmp_path):
    other = str(save(tmp_path / "other", names=NAMES[::-1]))
    results = run(tmp_path / "run", "--benchmark", "none", "--scenario", "domain", "--datasets", local[0], other)
    assert (results["tasks"], sorted(results["classes"])) == (["animals", "other"], sorted(NAMES))
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2]
    card = (tmp_path / "run" / "task-02" / "README.md").read_text()
    assert "| 1: animals |" in card and "| 2: other |" in card


def test_joint_learning_is_one_task_of_all_classes(local, tmp_path):
    results = run(tmp_path / "run", *arguments(local, "class"), "--learning", "joint")
    assert [len(row) for row in results["accuracy_matrix"]] == [1]
    assert sorted(results["classes"]) == sorted(NAMES)
    assert results["forgetting"] is None


def test_no_learning_is_zero_shot_by_the_same_protocol(local, tmp_path):
    results = run(tmp_path / "run", *arguments(local, "class"), "--learning", "none")
    assert results["accuracy_matrix"] == results["zero_shot"]["accuracy_matrix"]
    assert results["last"] == results["zero_shot"]["last"] and results["avg"] == results["zero_shot"]["avg"]
    assert results["assignment"]["towers"] == {}  # no layer was trained
    names = {"results.json", "accuracy_matrix.png", "predictions.safetensors", "gallery.json"}
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == names


@pytest.mark.parametrize(
    ("learning", "written"), [("none", "accuracy_matrix.png\n"), ("sequential", "accuracy_matrix.png, task-01/ …\n")]
)
def test_the_last_line_names_checkpoints_where_there_are_some(local, tmp_path, capsys, learning, written):
    options = ["--output_dir", str(tmp_path), "--model_name_or_path", small_clip(), *OPTIONS.split()]
    train.run(parse_recipe([*options, *arguments(local, "class"), "--learning", learning]))
    assert capsys.readouterr().out.endswith(f"Written to {tmp_path}: results.json, {written}")


def test_held_out_datasets_are_measured_before_and_after_every_task(local, tmp_path):
    more = ["--held_out", "cifar10-sample", "--max_test_images_per_class", "5"]
    results = run(tmp_path / "run", *arguments(local, "task"), *more)
    record = results["held_out"]["cifar10-sample"]
    assert len(record["after"]) == 2
    assert results["zero_shot_retention"] == pytest.approx(record["after"][-1] / record["zero_shot"])


@pytest.mark.parametrize("kept", [0.0, None])
def test_a_checkpoint_knows_of_held_out_datasets_of_which_nothing_was_kept(local, tmp_path, monkeypatch, kept):
    monkeypatch.setattr("hf_zocl.continual.scheduler.zero_shot_retention", lambda before, after: kept)
    more = ["--held_out", "cifar10-sample", "--max_test_images_per_class", "1"]
    results = run(tmp_path / "run", *arguments(local, "class"), *more)
    info = json.loads((tmp_path / "run" / "task-02" / "task.json").read_text())
    assert (info["zero_shot_retention"], info["held_out"]) == (kept, results["held_out"])
    assert "had no held-out dataset" not in (tmp_path / "run" / "task-02" / "README.md").read_text()


def test_an_ensemble_of_prompts_trains_with_the_first_and_is_kept_in_the_checkpoint(local, tmp_path):
    from hf_zocl import load_task_checkpoint

    prompts = ["a photo of a {}.", "a sketch of a {}."]
    run(tmp_path / "run", *arguments(local, "class"), "--prompt_template", *prompts)
    model, _ = load_task_checkpoint(tmp_path / "run" / "task-02")
    assert (list(model.prompt_template), model.prompts_per_class, len(model.input_ids)) == (prompts, 2, 8)
    card = (tmp_path / "run" / "task-02" / "README.md").read_text()
    assert "a sketch of a {}." in card


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scenario", "open"], "scenario='open' is unknown"),
        (["--learning", "twice"], "learning='twice' is unknown"),
        (["--learning", "joint", "--scenario", "task"], "learning=joint has one task"),
    ],
)
def test_what_does_not_go_together_is_said_when_the_recipe_is_read(more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_recipe(["--output_dir", str(tmp_path), *more])


def test_a_benchmark_takes_another_scenario(tmp_path):
    recipe = parse_recipe(["--output_dir", str(tmp_path), "--scenario", "task"])
    assert build_stream(recipe.run)[0].scenario == "task"


def test_corrupt_images_stop_a_run_before_training_or_are_left_out_and_counted(tmp_path):
    data = dataset()["train"].cast_column("image", Image(decode=False))
    rows = [dict(row) for row in data]
    rows[4]["image"] = {"bytes": b"no image at all", "path": None}
    folder = tmp_path / "animals"
    folder.mkdir()
    Dataset.from_list(rows, data.features).cast_column("image", Image()).to_parquet(str(folder / "train.parquet"))
    dataset()["test"].to_parquet(str(folder / "test.parquet"))
    local = ["--benchmark", "none", "--dataset_path", str(folder), "--increment", "2"]
    with pytest.raises(ValueError, match="train images: the image in row 4 cannot be decoded .*skip_corrupt"):
        run(tmp_path / "run", *local)
    assert not (tmp_path / "run" / "results.json").exists()
    assert run(tmp_path / "run", *local, "--skip_corrupt", "true")["skipped_images"] == 1


def test_a_held_out_benchmark_may_lie_in_a_folder(tmp_path):
    names = [f"class_{label}" for label in range(10)]
    folder = save(tmp_path / "copy", names=names, domains=("photo",), images=1)
    for file in folder.iterdir():
        Dataset.from_parquet(str(file)).rename_column("image", "img").to_parquet(str(file))
    recipe = parse_recipe(["--output_dir", str(tmp_path), "--held_out", f"cifar10={folder}"])
    (held_out,) = build_held_out(recipe.run).values()
    assert [(len(task.class_ids), len(task.train), len(task.test)) for task in held_out] == [(10, 0, 10)]
    assert held_out[0].prompt_template == "a photo of a {}."


@pytest.mark.parametrize(
    ("entry", "message"),
    [("cifar-10", "'cifar-10' is not registered"), ("mtil", "held_out='mtil': this is a stream of several")],
)
def test_a_held_out_benchmark_that_is_none_is_named(entry, message, tmp_path):
    recipe = parse_recipe(["--output_dir", str(tmp_path), "--held_out", entry])
    with pytest.raises(ValueError, match=message):
        build_held_out(recipe.run)


@pytest.mark.parametrize(
    ("run", "entry"),
    [
        ({}, "cifar10-sample"),
        ({"benchmark": "cifar100-inc5"}, "cifar100=/a/copy"),
        ({"benchmark": "mtil"}, "dtd"),
        ({"benchmark": "tiny-imagenet-32"}, "tiny-imagenet-32=/a/copy"),
        ({"benchmark": "none", "dataset_name": "ethz/food101"}, "food-101"),
        ({"benchmark": "none", "datasets": ["ylecun/mnist", "b"]}, "mnist"),
    ],
)
def test_a_dataset_that_the_run_learns_is_not_held_out(run, entry):
    with pytest.raises(ValueError, match=f"held_out='{entry}': the run learns that dataset itself; expected others"):
        build_held_out(RunArguments(**run, held_out=[entry]))


def test_a_held_out_benchmark_that_is_there_twice_is_refused():
    args = RunArguments(benchmark="cifar10", held_out=["cifar10-sample", "cifar10-sample=/another/copy"])
    with pytest.raises(ValueError, match="held_out='cifar10-sample=/another/copy': 'cifar10-sample' is named twice"):
        build_held_out(args)


def test_domains_that_number_their_classes_otherwise_have_the_ids_of_their_own():
    streams = [
        stream(dataset(names=names, domains=["photo"]), increment="all", name=name)
        for name, names in (("photos", ["cat", "dog"]), ("sketches", ["dog", "cat"]))
    ]
    for task in TaskStream.from_streams(streams, "pets", "domain"):
        feature = task.test.features["label"]
        assert task.class_names == ("cat", "dog")
        assert tuple(feature.int2str(own) for own in task.class_ids) == task.class_names


def test_tasks_in_another_order_than_their_labels_are_refused():
    tasks = list(stream())
    with pytest.raises(ValueError, match=re.escape("stream 'turned': tasks [2, 1] in this order; expected 1 to 2")):
        TaskStream(tasks[::-1], "turned")
