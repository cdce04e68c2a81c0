"""Several settings side by side, worked out by hand."""

import json
from pathlib import Path

import pytest

from hf_zocl.report import compare_runs


def save(folder: Path, seed: int, last: float, avg: float, **more) -> None:
    results = {
        "seed": seed,
        "accuracy_matrix": [[avg], [avg, last]],
        "seen_accuracy": [2 * avg - last, last],
        "zero_shot": {"last": 0.1, "avg": 0.2, "seen_accuracy": [0.3, 0.1]},
        **{"last": last, "avg": avg, "forgetting": 0.1, "seconds": 10.0, "peak_memory_bytes": 2_000_000_000, **more},
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    for seed, last in ((1993, 0.50), (1996, 0.54)):
        save(tmp_path / "fo" / f"seed-{seed}", seed, last, 0.6)
    for seed, last in ((1993, 0.53), (1996, 0.55), (1997, 0.90)):
        save(tmp_path / "hop_odd" / f"seed-{seed}", seed, last, 0.6)
    (tmp_path / "notes.txt").write_text("a shell's runs/* finds files too")
    return sorted(tmp_path.iterdir())


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_mean_and_sample_standard_deviation_over_the_seeds(runs):
    heading, _, zero_shot, fo, hop_odd, *_ = compare_runs(runs).markdown().splitlines()
    assert cells(heading)[:4] == ["setting", "seeds", "Last", "Avg"]
    assert cells(zero_shot)[:4] == ["zero-shot", "", "10.0", "20.0"]
    assert cells(fo)[:4] == ["fo", "2", "52.0 ± 2.8", "60.0 ± 0.0"]
    assert cells(hop_odd)[:3] == ["hop_odd", "3", "66.0 ± 20.8"]


def test_differences_are_paired_by_seed_over_the_seeds_that_both_have(runs):
    lines = compare_runs(runs, baseline="fo").markdown().splitlines()
    assert cells(lines[0])[-2:] == ["Δ Last", "Δ Avg"]
    assert cells(lines[3])[-2:] == ["baseline", "baseline"]
    # +3 and +1 points; the seed 1997 has no partner.
    assert cells(lines[4])[-2:] == ["+2.0 ± 1.4", "+0.0 ± 0.0"]


def test_latex_has_the_same_cells_and_no_bare_special_character(runs):
    text = compare_runs(runs, baseline="fo").latex()
    assert r"hop\_odd & 3 & 66.0 $\pm$ 20.8" in text
    assert r"$\Delta$ Last" in text and "±" not in text.split("\n", 1)[1]
    assert text.count(r"\\") == 4 and r"\begin{tabular}{lrrrr" in text


def test_both_tables_are_written(runs, tmp_path):
    comparison = compare_runs(runs, "fo")
    assert [path.name for path in comparison.write(tmp_path / "out")] == ["comparison.md", "comparison.tex"]
    assert (tmp_path / "out" / "comparison.md").read_text() == comparison.markdown() + "\n"


def test_figures_that_only_some_runs_have_are_shown_where_they_are(runs, tmp_path):
    save(tmp_path / "more" / "seed-1", 1, 0.5, 0.6, forward_transfer=0.05, mtil={"transfer": 0.4, "avg": 0.6})
    lines = compare_runs([*runs, tmp_path / "more"]).markdown().splitlines()
    for heading, value in (("FWT", "5.0"), ("Transfer", "40.0"), ("MTIL Avg", "60.0")):
        column = cells(lines[0]).index(heading)
        assert [cells(line)[column] for line in lines[3:6]] == ["–", "–", value]


def test_an_unknown_baseline_lists_those_there_are(runs):
    with pytest.raises(ValueError, match="baseline='of': expected one of 'fo', 'hop_odd'"):
        compare_runs(runs, "of")


def test_a_setting_without_a_common_seed_is_named(runs, tmp_path):
    save(tmp_path / "alone" / "seed-7", 7, 0.5, 0.6)
    with pytest.raises(ValueError, match=r"alone \(seeds \[7\]\) has no seed in common with fo \(\[1993, 1996\]\)"):
        compare_runs([*runs, tmp_path / "alone"], "fo")


def test_a_run_that_is_not_at_its_end_is_named(runs, tmp_path):
    save(tmp_path / "late" / "seed-0", 0, 0.5, 0.6, tasks=["birds", "ships", "trucks"])
    save(tmp_path / "late" / "seed-1", 1, 0.5, 0.6, tasks=["birds", "ships"])
    comparison = compare_runs([*runs, tmp_path / "late"])
    assert comparison.note.endswith("Unfinished, with their figures so far: late: seed 0 (2 of 3 tasks).")
    assert "Unfinished" not in compare_runs(runs).note


def test_runs_that_are_not_the_seeds_of_one_setting_are_not_averaged(tmp_path):
    save(tmp_path / "runs" / "a", 0, 0.5, 0.6, benchmark="a")
    save(tmp_path / "runs" / "b", 0, 0.9, 0.9, benchmark="a")
    with pytest.raises(ValueError, match="seeds 0, 0 of a; name the folder of each setting"):
        compare_runs([tmp_path / "runs"])
    save(tmp_path / "more" / "a", 0, 0.5, 0.6, benchmark="a")
    save(tmp_path / "more" / "b", 1, 0.9, 0.9, benchmark="b")
    with pytest.raises(ValueError, match="seeds 0, 1 of a, b"):
        compare_runs([tmp_path / "more"])
