"""`python -m hf_zocl`: its commands, what importing the package costs, and the package as it is installed."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_zocl.__main__ import COMMANDS, main
from hf_zocl.commands import library


ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run_main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["__main__.py", *arguments])
    main()


@pytest.mark.parametrize("arguments", ["--help", "recipes"])
def test_help_and_recipes_import_nothing_heavy(arguments):
    run_python(
        f"import runpy, sys; sys.argv = ['hf_zocl', '{arguments}']; runpy.run_module('hf_zocl', run_name='__main__'); "
        "assert not {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)"
    )


def test_help_has_a_line_for_every_command(monkeypatch, capsys):
    run_main(monkeypatch, "--help")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if line and line[0] in COMMANDS] == list(COMMANDS)


def test_recipes_are_listed_with_their_first_lines(monkeypatch, capsys):
    run_main(monkeypatch, "recipes")
    out = capsys.readouterr().out
    for kind in ("recipe", "preset"):
        for name in library.names(kind):
            first = library.find(kind, name).read_text(encoding="utf-8").splitlines()[0]
            assert f"  {name} " in out
            assert first.removeprefix("# ") in out
            assert first.endswith((".", "joint", "none"))  # a line that says a whole thing


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "a command is missing"),
        (["trian"], "'trian' is not a command; did you mean 'train'?"),
        (["--recipe", "quickstart"], "'--recipe' is not a command"),
    ],
)
def test_no_command_and_an_unknown_one_end_in_one_line_of_usage(arguments, said, monkeypatch):
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, *arguments)
    assert end.value.code.startswith(f"error: usage: python -m hf_zocl {'|'.join(COMMANDS)} …: {said}")
    assert "\n" not in end.value.code


def test_a_command_refuses_in_one_line_and_shows_the_traceback_when_asked(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="^error: .*at least one complete task"):
        run_main(monkeypatch, "push", str(tmp_path))
    with pytest.raises(ValueError, match="at least one complete task"):
        run_main(monkeypatch, "push", str(tmp_path), "--debug")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "recipes"])
def test_every_script_is_a_door_to_its_command(name):
    text = (ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8")
    assert f"from hf_zocl.commands.{name} import main" in text
    assert len(text.splitlines()) < 25
    if name != "evaluate":
        door = runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="door")
        assert door["main"].__module__ == f"hf_zocl.commands.{name}"


def test_the_package_and_its_method_import_no_more_than_they_use():
    run_python(
        "import sys, hf_zocl; assert not {'torch', 'peft'} & set(sys.modules); assert 'ZOCLTrainer' in dir(hf_zocl); "
        "import hf_zocl.zo; assert not {'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules)"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports", ["import hf_zocl, peft", "import hf_zocl, transformers.trainer", "import peft, hf_zocl"]
)
def test_peft_knows_the_moe_adapters_in_whichever_order_it_is_imported(imports):
    run_python(
        f"{imports}; from peft import PeftType, get_peft_config; get_peft_config({{'peft_type': 'MOE_ADAPTER'}})"
    )


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import hf_zocl

    with pytest.raises(AttributeError, match="no attribute 'ZOTrainer'"):
        hf_zocl.ZOTrainer  # noqa: B018
    assert all(getattr(hf_zocl, name) is not None for name in hf_zocl.__all__)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Runs a command with the package as its wheel has it, in an empty folder."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("installed")
    source, site, empty = folder / "source", folder / "site", folder / "empty"
    for name in ("hf_zocl", "model_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = {"check": True, "capture_output": True, "text": True}
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)], **options
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], **options)
    empty.mkdir()

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=empty, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder, run.site = empty, site
    return run


@pytest.mark.slow
def test_the_wheel_runs_without_the_checkout(installed):
    assert (installed.site / "hf_zocl" / "py.typed").is_file()
    assert [line.split()[0] for line in installed("hf_zocl", "recipes").splitlines() if line.startswith("  ")] == [
        name for kind in ("recipe", "preset") for name in library.names(kind)
    ]
    launcher = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --cpu".split()
    small = "--increment 5 --initial_increment 5 --max_steps 2 --max_test_images_per_class 5".split()
    recipe = ["hf_zocl", "train", "--recipe", "quickstart", "--preset", "all-zo", "--output_dir", "run", *small]
    recipe += ["--classifier_alignment", "0"]  # beside which no log of steps is kept
    assert "Written to run" in installed("accelerate.commands.launch", *launcher, "-m", *recipe)
    results = json.loads((installed.folder / "run" / "results.json").read_text(encoding="utf-8"))
    assert (results["recipe"]["preset"], results["recipe"]["zo_layers"]) == ("all-zo", "all")
    assert "accuracy" in installed("hf_zocl", "evaluate", "run", "--task", "2", "--disable_tqdm")
    assert "Written to" in installed("hf_zocl", "report", "run")
    assert "bit for bit" in installed("hf_zocl", "replay", "run")
