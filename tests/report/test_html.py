"""The report: what is in it, and how a real browser lays it out."""

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from hf_zocl.report import load_groups, write_report
from hf_zocl.report.comparison_charts import accuracy, comparison_charts, standings
from hf_zocl.report.one_run import view
from tests.report.browser import lay_out, needs_browser
from tests.report.runs import save_run, save_whole_run


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two settings with three seeds each."""
    for seed in (0, 1, 2):
        save_run(tmp_path / "runs" / "fo" / f"seed-{seed}", seed, zo_branch="none")
        save_whole_run(tmp_path / "runs" / "language hop-odd" / f"seed-{seed}", seed, tasks=5)
    return [tmp_path / "runs" / "fo", tmp_path / "runs" / "language hop-odd"]


def test_one_file_holds_everything(runs, tmp_path):
    path = write_report(runs, tmp_path / "report", baseline="fo")
    text = path.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "<script" not in text and "url(" not in text and "http" not in text
    names = {file.name for file in (tmp_path / "report").iterdir()}
    assert names == {"comparison.md", "comparison.tex", "report.html"}


def test_a_run_shows_all_that_its_files_hold(tmp_path):
    text = write_report([save_whole_run(tmp_path / "run", 0)], tmp_path).read_text(encoding="utf-8")
    assert text.count("<strong>") == 4 and text.count("zero-shot") > 4
    for words in (
        "Accuracy matrix",
        "known and forgotten",
        "Confusion after the last task",
        "Most frequent mistakes",
        "Loss",
    ):
        assert words in text
    for words in ("Difference against noise", "Variance by layer", "Layers", "Record"):
        assert words in text
    assert text.count('<div class="card">') == 3 * 8 and text.count('<div class="layer ') == 7


def test_an_older_run_is_reported_without_what_it_did_not_keep(tmp_path):
    text = write_report([save_run(tmp_path / "run", 0)], tmp_path).read_text(encoding="utf-8")
    assert "Accuracy matrix" in text and ">Loss<" in text
    assert "Confusion" not in text and 'class="card"' not in text and "<h2>Layers" not in text


def test_a_run_of_one_task_and_no_zeroth_order_layer_has_no_empty_figure(tmp_path):
    run = save_run(tmp_path / "run", 0, tasks=1, zo_branch="none")
    groups = load_groups([run])
    assert comparison_charts(groups) == [] and view(groups[0]).charts == ()
    text = write_report([run], tmp_path).read_text(encoding="utf-8")
    assert "<svg" not in text and text.count("<figure>") == 1


def test_the_settings_stand_where_their_means_are(runs):
    groups = load_groups(runs)
    found, top = standings(groups)
    assert [one.name for one in found] == ["zero-shot", *(group.name for group in groups)]
    for one, group in zip(found[1:], groups, strict=True):
        last, avg = one.marks
        assert last[0] * top / 100 == pytest.approx(100 * group.values("last").mean())
        assert avg[0] * top / 100 == pytest.approx(100 * group.values("avg").mean())


def test_bars_are_the_standard_deviation_over_seeds(runs):
    group = load_groups(runs)[0]
    curves = 100 * group.curves("seen_accuracy")
    series = accuracy([group]).series[0]
    assert np.array(series.high) - np.array(series.low) == pytest.approx(2 * curves.std(axis=0, ddof=1))
    assert np.array(series.y) == pytest.approx(curves.mean(axis=0))


def test_settings_are_told_apart_without_colour(runs):
    chart = accuracy(load_groups(runs))
    looks = [re.sub(r"[cM]\w*[\d. ]+|c\d", "", str(one.mark)) for one in chart.series]
    assert len(set(looks)) == len(looks) == 3


def test_the_head_has_zero_shot_beside_each_number(tmp_path):
    zero_shot = {"last": 0.3, "avg": 0.45, "seen_accuracy": [0.6, 0.3], "accuracy_matrix": [[0.6], [0.4, 0.2]]}
    more = {"zero_shot": zero_shot, "forgetting": 0.1, "backward_transfer": -0.1}
    (group,) = load_groups([save_run(tmp_path / "run", 0, tasks=2, more=more)])
    assert [figure.zero_shot for figure in view(group).head] == ["30.0", "45.0", "20.0", "-20.0"]
    assert [figure.value for figure in view(group).head][2:] == ["10.0", "-10.0"]
    assert view(group).head[0].meaning == "accuracy on all classes, after the last task"
    more["scenario"] = "cross-dataset"
    (group,) = load_groups([save_run(tmp_path / "datasets", 0, tasks=2, more=more)])
    assert view(group).head[0].meaning == "mean accuracy on the datasets, after the last task"


def test_the_recipe_names_what_else_has_made_the_figures(tmp_path):
    run = save_run(tmp_path / "run", 0, classifier_alignment=100, frozen_parameters=["lora_A"])
    text = write_report([run], tmp_path).read_text(encoding="utf-8")
    assert "<dt>classifier_alignment</dt><dd>100</dd>" in text and "<dt>frozen_parameters</dt>" in text


def test_layers_are_in_order_and_what_is_outside_them_comes_last(tmp_path):
    towers = {"language": {"other": "fo", "10": "zo", "2": "fo+zo"}, "vision": {"other": "zo"}}
    (group,) = load_groups([save_run(tmp_path / "run", 0, more={"assignment": {"towers": towers}})])
    assert view(group).layers["language"] == [("2", "mix"), ("10", "ZO"), ("other", "FO")]
    assert view(group).layers["vision"] == [("other", "ZO")]


def test_the_report_names_no_local_path_and_no_token(tmp_path):
    run = save_run(
        tmp_path / "run", 0, model_name_or_path="/srv/private/clip", hub_token="hf_secret", output_dir="/srv/x"
    )
    text = write_report([run], tmp_path).read_text(encoding="utf-8")
    assert "private" not in text and "hf_secret" not in text and "/srv" not in text
    assert "<dt>model_name_or_path</dt><dd>clip</dd>" in text


NASTY = ["<script>planted = 1</script>", '<img src=x onerror="planted = 2">', '"><b onclick=1>', "{{ 7 * 7 }}", "a&b"]


def nasty_run(folder: Path) -> Path:
    names = [*NASTY, *(f"<i>{n}</i>" for n in range(4))]
    run = save_whole_run(folder, 0, names=names)
    results = json.loads((run / "results.json").read_text())
    results |= {"benchmark": NASTY[1], "tasks": NASTY[:3], "versions": {NASTY[0]: NASTY[1]}}
    results["recipe"] |= {"prompt_template": NASTY[0], "zo_layers": [NASTY[1]]}
    results["assignment"]["towers"] = {NASTY[1]: {"1": NASTY[0]}}
    log = results["training"][0]
    results["training"][0] = {**log, "zo_variance_<script>": 1.0}
    (run / "results.json").write_text(json.dumps(results))
    return run


@pytest.mark.parametrize("many", [False, True])
def test_no_name_is_read_as_markup(many, tmp_path):
    run = nasty_run(tmp_path / "a<b>&c")
    folders = [run, save_run(tmp_path / "other<script>", 1, tasks=3)] if many else [run]
    text = write_report(folders, tmp_path / "report").read_text(encoding="utf-8")
    assert "&lt;script&gt;planted" in text and "a&lt;b&gt;&amp;c" in text and "{{ 7 * 7 }}" in text
    for markup in ("<script", "<img src=x", "<b onclick", "<i>0", "a<b>"):
        assert markup not in text


def test_a_damaged_file_is_named(tmp_path):
    run = save_whole_run(tmp_path / "run", 0)
    for name, content, words in (
        ("predictions.safetensors", b"\x00" * 40, "not the predictions of a run"),
        ("gallery.json", b'{"tasks": {"1": [{"image": 1000, "webp": ""}]}}', "not the gallery of this run"),
        ("task-02/training_log.json", b'{"step": [1], "loss": ["<b>"]}', "not the training log"),
    ):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{Path(name).name}.*{words}"):
            write_report([run], tmp_path)
        (run / name).write_bytes(whole)
    write_report([run], tmp_path)


def test_predictions_of_another_run_are_refused(tmp_path):
    run = save_whole_run(tmp_path / "run", 0)
    other = save_whole_run(tmp_path / "other", 0, tasks=2)
    (run / "predictions.safetensors").write_bytes((other / "predictions.safetensors").read_bytes())
    with pytest.raises(ValueError, match="not of the run whose results.json is next to it"):
        write_report([run], tmp_path)


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_real_browser_fits_one_run_to_its_width(width, dark, tmp_path):
    found = lay_out(write_report([save_whole_run(tmp_path / "run", 0)], tmp_path), width, tmp_path, dark)
    assert found["view"] == width and found["page"] <= width
    assert found["wide"] == found["over"] == found["console"] == []
    assert found["images"] == found["drawn"] == 24 and found["charts"] == 5 and found["words"] > 200
    assert found["background"] == ("rgb(22, 24, 29)" if dark else "rgb(255, 255, 255)")


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_a_real_browser_fits_several_runs_to_its_width(width, runs, tmp_path):
    found = lay_out(write_report(runs, tmp_path / "report", baseline="fo"), width, tmp_path)
    assert found["page"] <= found["view"] == width
    assert found["wide"] == found["over"] == found["console"] == []
    assert found["images"] == found["drawn"] and found["charts"] >= 7


@needs_browser
@pytest.mark.parametrize("tasks", [1, 2, 12, 20])
def test_a_real_browser_fits_short_and_long_streams(tasks, tmp_path):
    names = [f"a rather long name of the class number {n}" for n in range(10 * tasks)]
    run = save_whole_run(tmp_path / "run", 0, tasks, classes=10, images=3, names=names)
    found = lay_out(write_report([run], tmp_path), 400, tmp_path)
    assert found["page"] <= found["view"] == 400
    assert found["wide"] == found["over"] == found["console"] == []


@needs_browser
def test_a_real_browser_reads_no_name_as_markup(tmp_path):
    found = lay_out(write_report([nasty_run(tmp_path / "run")], tmp_path), 400, tmp_path)
    assert found["console"] == [] and found["scripts"] == 0 and found.get("planted") is None
    assert found["images"] == found["drawn"] and NASTY[1] in found["title"]


@needs_browser
def test_the_probe_sees_what_overlaps_and_what_is_too_wide(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<body style="margin:0"><p style="width:900px;text-align:right">wide</p>'
        '<p style="position:absolute;top:0">one</p>'
        '<p style="position:absolute;top:0">two</p><script>console.error("bad")</script></body>'
    )
    found = lay_out(page, 400, tmp_path)
    assert found["page"] == 900 and found["wide"] == ["wide"]
    assert ["one", "two"] in found["over"] and found["console"]


@pytest.mark.slow
def test_ten_runs_of_twenty_tasks_and_two_hundred_classes_are_one_small_file_in_seconds(tmp_path):
    folders = [save_whole_run(tmp_path / f"run {n}", n, 20, 10, 50, side=96) for n in range(10)]
    for folder in folders:  # of one seed, so that their differences are paired
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps({**results, "seed": 0}))
    started = time.perf_counter()
    path = write_report(folders, tmp_path / "report", baseline="run 0")
    print(f"{(seconds := time.perf_counter() - started):.2f} s, {path.stat().st_size} bytes")
    assert seconds < 20
    assert path.stat().st_size < 5_000_000
    text = path.read_text(encoding="utf-8")
    assert text.count("Confusion after the last task") == 10 and text.count('class="card"') >= 200


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        write_report([tmp_path / "nowhere"], tmp_path)


def test_folders_without_a_finished_task_are_no_runs(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no results.json with a finished task in .*empty"):
        write_report([tmp_path / "empty"], tmp_path)


def test_a_file_that_is_no_run_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text('{"seed": 1}')
    with pytest.raises(ValueError, match="run/results.json: not the results of a run: accuracy_matrix, seen_accuracy"):
        write_report([tmp_path / "run"], tmp_path)
