"""Runs of several benchmarks stay apart, wrong results are refused by name, and no name is read as markup."""

import json
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hf_zocl.report import compare_runs, load_groups, write_report
from hf_zocl.report.comparison_charts import accuracy
from hf_zocl.report.escape import latex, markdown, markdown_code, mathtext, one_line
from hf_zocl.report.html import MAX_DRAWN, compared
from hf_zocl.report.one_run import view


def results(benchmark: str = "pets", **changes) -> dict:
    return {
        "benchmark": benchmark,
        "scenario": "class",
        "classes": ["cat", "dog"],
        "tasks": ["task-01", "task-02"],
        "recipe": {"model_name_or_path": "some/clip"},
        "seed": 0,
        "accuracy_matrix": [[0.6], [0.5, 0.4]],
        "seen_accuracy": [0.6, 0.45],
        "zero_shot": {"last": 0.1, "avg": 0.2, "seen_accuracy": [0.3, 0.1]},
        **{"last": 0.45, "avg": 0.5, "forgetting": 0.1, "seconds": 10.0, "peak_memory_bytes": 2_000_000_000},
        **changes,
    }


def save(folder: Path, content) -> Path:
    folder.mkdir(parents=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "results.json").write_text(text, encoding="utf-8")
    return folder


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def test_runs_of_two_benchmarks_are_kept_apart_each_with_its_own_zero_shot(tmp_path):
    other = {"last": 0.7, "avg": 0.8, "seen_accuracy": [0.9, 0.7]}
    folders = [
        save(tmp_path / "a", results()),
        save(tmp_path / "b", results("cars", classes=["van", "bus", "cab"], zero_shot=other)),
        save(tmp_path / "c", results(last=0.55)),
    ]
    comparison = compare_runs(folders, baseline="a")
    heading, _, *table = rows(comparison.markdown())
    assert heading[:3] == ["benchmark", "setting", "seeds"]
    assert [row[1] for row in table] == ["zero-shot", "a", "c", "zero-shot", "b"]
    assert [row[0].split(" ")[0] for row in table] == ["pets"] * 3 + ["cars"] * 2
    assert [row[3] for row in table if row[1] == "zero-shot"] == ["10.0", "70.0"]
    assert [row[-2] for row in table] == ["", "baseline", "+10.0", "", "–"]
    assert "cannot be compared" in comparison.note
    pets, cars = compared(load_groups(folders))
    assert pets.name.startswith("pets") and [one.name for one in pets.standings] == ["zero-shot", "a", "c"]
    assert cars.name.startswith("cars") and cars.standings == []
    assert [each.charts[0].title for each in (pets, cars)] == ["Accuracy over tasks"] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"scenario": "task"},
        {"classes": ["cat", "cow"]},
        {"tasks": ["task-01", "task-02", "task-03"]},
        {"recipe": {"model_name_or_path": "another/model"}},
        {"recipe": {"model_name_or_path": "some/clip", "max_test_images_per_class": 5}},
    ],
)
def test_what_cannot_be_compared_is_another_benchmark(tmp_path, changes):
    folders = [save(tmp_path / "a", results()), save(tmp_path / "b", results(**changes))]
    assert len([row for row in compare_runs(folders).rows if row[1] == "zero-shot"]) == 2


def cut(*seen: int) -> dict:
    """The results of a run by how many classes were seen after each task."""
    return results(details=[{"per_class_accuracy": [0.5] * count} for count in seen])


def test_tasks_of_other_sizes_are_another_benchmark(tmp_path):
    folders = [save(tmp_path / name, each) for name, each in (("a", cut(2, 6)), ("b", cut(4, 6)), ("c", cut(2, 6)))]
    assert [row[1] for row in compare_runs(folders, "a").rows] == ["zero-shot", "a", "c", "zero-shot", "b"]
    untold = save(tmp_path / "d", results())  # a run without training has no details
    assert compare_runs([*folders[::2], untold]).headings[0] == "setting"
    assert compare_runs([untold, *folders]).headings[0] == "benchmark"


def test_joint_learning_stands_beside_what_was_learned_task_by_task(tmp_path):
    joint = results(tasks=["task-01"], recipe={"model_name_or_path": "x/clip", "learning": "joint"})
    folders = [save(tmp_path / "joint", joint), save(tmp_path / "a", results())]
    assert compare_runs(folders).headings[0] == "setting"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "accuracy_matrix, seen_accuracy, zero_shot, seed is missing"),
        (results(accuracy_matrix=3), "expected accuracy_matrix to be rows of numbers"),
        (results(accuracy_matrix=[[0.1], ["x", 1]]), "expected accuracy_matrix to be rows of numbers"),
        (results(accuracy_matrix=[[0.1], [1]]), "row 2: 1 entries, not 2"),
        (results(accuracy_matrix=[[float("nan")], [0, 0]]), "expected accuracy_matrix"),
        (results(seen_accuracy=[0.1]), "seen_accuracy has 1 entries after 2 tasks"),
        (results(seen_accuracy=None), "expected seen_accuracy to be numbers"),
        (results(zero_shot=[]), "expected zero_shot to be seen_accuracy, last and avg"),
        (results(zero_shot={"seen_accuracy": [1, 1], "last": 1}), "expected zero_shot"),
        (results(zero_shot={"seen_accuracy": [1], "last": 1, "avg": 1}), "zero_shot has 1 entries"),
        (results(seed="0"), "expected seed to be a whole number, got '0'"),
        (results(last="x"), "expected last to be a number"),
        (results(last=10**400), "expected last to be a number"),
        (results(forgetting=[]), "expected forgetting to be a number or null"),
        (results(training=[3]), "expected training to be a log of numbers"),
        (results(training=[{"loss": "x"}]), "expected training to be a log of numbers"),
        (results(tasks="ab"), "expected tasks to be the names of the tasks"),
        (results(details=[{"per_class_accuracy": 3}]), "expected details to be figures by name, for each task"),
        (results(recipe=[]), "expected recipe to be values by name"),
        (results(versions="1"), "expected versions to be values by name"),
        (results(mtil={"avg": "x"}), "expected mtil to be numbers by name"),
        (results(skipped_images="many"), "expected skipped_images to be a number"),
    ],
)
def test_results_of_a_wrong_kind_are_refused_by_name(tmp_path, content, message):
    folder = save(tmp_path / "a", content)
    with pytest.raises(ValueError, match=message) as error:
        write_report([folder], tmp_path / "report")
    assert str(folder / "results.json") in str(error.value) and "\n" not in str(error.value)


NASTY = r"a|b`c*d_ $x$ <img src=x> [l](u) & 100% #1 {y} \n ~z^ \input{x}"


def test_a_name_is_text_in_every_format():
    assert markdown("zo_only") == "zo_only" and markdown("_a_ b") == r"\_a\_ b"
    for character in "|`*<[]$&":
        assert f"\\{character}" in markdown(f"x{character}y")
    assert markdown_code("a`b``c") == "``` a`b``c ```" and markdown_code("cat") == "`cat`"
    assert latex('100% a_b^c~{}\\<|>"`') == (
        r"100\% a\_b\textasciicircum{}c\textasciitilde{}\{\}\textbackslash{}\textless{}\textbar{}\textgreater{}"
        r"\textquotedbl{}\textasciigrave{}"
    )
    assert one_line("a\n\r\x1b[31mb\u202ec\ud800") == "a [31mb c?"
    figure = Figure()
    for text in ("$x$", r"\$x$", "_a", "100 $", NASTY):
        drawn = figure.text(0.5, 0.5, mathtext(text))
        assert not drawn.get_text().startswith("_")
        figure.canvas.draw()
        assert not drawn._preprocess_math(drawn.get_text())[1]
        assert drawn._preprocess_math(drawn.get_text())[0].strip() == one_line(text)


def test_a_run_of_a_nasty_name_is_reported(tmp_path):
    name = "a$b$ _c` & 100% ^x"
    folders = [save(tmp_path / name, results()), save(tmp_path / "_plain", results())]
    write_report(folders, tmp_path / "report")
    table = (tmp_path / "report" / "comparison.md").read_text()
    assert r"a\$b\$ \_c\` \& 100% ^x" in table
    assert (
        r"a\$b\$ \_c\textasciigrave{} \& 100\% \textasciicircum{}x &"
        in (tmp_path / "report" / "comparison.tex").read_text()
    )


def test_a_note_cannot_leave_its_comment(tmp_path):
    unfinished = results(tasks=["1", "2", "3"])
    folders = [save(tmp_path / name, unfinished) for name in ("a", "b\n\\evil")]
    comparison = compare_runs(folders)
    assert "evil" in comparison.note and "\n\\evil" not in comparison.latex()


@pytest.mark.parametrize("name", ["zo_branch", "learning_rate", "increment", "max_test_images_per_class"])
def test_runs_of_several_settings_are_not_taken_for_seeds_of_one(tmp_path, name):
    for seed, value in ((0, 1), (1, 2)):
        recipe = {name: value, "seed": seed, "class_order_seed": seed, "output_dir": f"runs/{seed}"}
        save(tmp_path / f"run-{seed}", results(seed=seed, recipe=recipe))
    with pytest.raises(ValueError, match=f"got {name} 1 and 2; name the folder of each setting"):
        load_groups([tmp_path])
    assert len(load_groups([tmp_path / "run-0", tmp_path / "run-1"])) == 2
    same = results(seed=1, recipe={name: 1, "seed": 1, "class_order_seed": 1, "output_dir": "elsewhere"})
    (tmp_path / "run-1" / "results.json").write_text(json.dumps(same))
    assert [len(group.runs) for group in load_groups([tmp_path])] == [2]


def test_runs_in_python_on_two_base_models_are_neither_seeds_nor_of_one_table(tmp_path):
    """Their recipe does not name the base model; its checksum tells them apart."""
    small, large = ({"recipe": {}, "fingerprints": {"images": "i", "base_model": name * 64}} for name in "ab")
    one = [save(tmp_path / f"small/seed-{seed}", results(seed=seed, **small)) for seed in (0, 1)]
    save(tmp_path / "mixed/seed-0", results(seed=0, **small))
    other = save(tmp_path / "mixed/seed-1", results(seed=1, **large))
    assert [len(group.runs) for group in load_groups([tmp_path / "small"])] == [2]
    with pytest.raises(ValueError, match="got model_name_or_path 'base aaaaaaaa' and 'base bbbbbbbb'"):
        load_groups([tmp_path / "mixed"])
    assert len([row for row in compare_runs([one[0], other]).rows if row[1] == "zero-shot"]) == 2


def test_zero_shot_is_over_the_tasks_that_a_run_has_finished(tmp_path):
    untrained = {"seen_accuracy": [0.8, 0.6, 0.1], "last": 0.1, "avg": 0.5}
    whole = save(tmp_path / "whole", results(tasks=["1", "2"], zero_shot=untrained))
    unfinished = save(tmp_path / "unfinished", results(tasks=["1", "2", "3"], zero_shot=untrained))
    for folder, last, avg in ((whole, "10.0", "50.0"), (unfinished, "60.0", "70.0")):
        (group,) = load_groups([folder])
        assert group.tasks == 2
        comparison = compare_runs([folder])
        row = dict(zip(comparison.headings, comparison.rows[0], strict=True))
        assert (row["setting"], row["Last"], row["Avg"]) == ("zero-shot", last, avg)
        assert f"{100 * group.zero_shot['last']:.1f}" == last


def test_zero_shot_is_that_of_all_seeds_which_may_have_other_tasks(tmp_path):
    first = {"seen_accuracy": [0.8, 0.6], "last": 0.6, "avg": 0.7, "accuracy_matrix": [[0.8], [0.4, 0.8]]}
    second = {"seen_accuracy": [0.4, 0.6], "last": 0.6, "avg": 0.5, "accuracy_matrix": [[0.4], [0.4, 0.8]]}
    for seed, untrained in enumerate((first, second)):
        same = {name: untrained[name] for name in ("seen_accuracy", "last", "avg", "accuracy_matrix")}
        save(tmp_path / "run" / f"seed-{seed}", results(seed=seed, zero_shot=untrained, **same))
    (group,) = load_groups([tmp_path / "run"])
    assert compare_runs([tmp_path / "run"]).rows[0][2:4] == ("60.0", "60.0")
    assert [figure.zero_shot for figure in view(group).head] == ["60.0", "60.0", "20.0", "-20.0"]
    assert list(accuracy([group]).series[-1].y) == pytest.approx([60, 60])
    text = write_report([tmp_path / "run"], tmp_path / "report").read_text(encoding="utf-8")
    assert "curves of the training and recipe: those of seed 0." in text
    one = write_report([tmp_path / "run" / "seed-1"], tmp_path / "one").read_text(encoding="utf-8")
    assert "those of seed" not in one


def test_zero_shot_beside_several_settings_is_over_all_their_tasks(tmp_path):
    untrained = {"seen_accuracy": [0.8, 0.6], "last": 0.6, "avg": 0.7}
    joint = {"seen_accuracy": [0.6], "last": 0.6, "avg": 0.6}
    recipe = {"model_name_or_path": "some/clip", "learning": "joint"}
    one_task = {"tasks": ["task-01"], "accuracy_matrix": [[0.9]], "seen_accuracy": [0.9]}
    begun = {"accuracy_matrix": [[0.9]], "seen_accuracy": [0.9]}
    folders = [
        save(tmp_path / "all at once", results(recipe=recipe, zero_shot=joint, **one_task)),
        save(tmp_path / "begun", results(zero_shot=untrained, **begun)),
        save(tmp_path / "whole", results(zero_shot=untrained)),
    ]
    for order in (folders, folders[::-1]):
        row = compare_runs(order).rows[0]
        assert (row[0], row[2:4]) == ("zero-shot", ("60.0", "70.0"))
        (side_by_side,) = compared(load_groups(order))
        assert side_by_side.standings[0].text == "Last 60.0, Avg 70.0"


@pytest.mark.slow
def test_a_thousand_runs_are_reported_in_seconds(tmp_path):
    folders = [save(tmp_path / f"run-{number}", results()) for number in range(1000)]
    started = time.perf_counter()
    page = write_report(folders, tmp_path / "report").read_text()
    assert time.perf_counter() - started < 100
    assert page.count("<summary>") == 1000 and f"The first {MAX_DRAWN} of 1000 settings." in page
