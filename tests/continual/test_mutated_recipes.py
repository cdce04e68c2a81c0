"""Recipes with wrong types, ranges and keys: each runs, or ends in one line that is no traceback."""

import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers import SchedulerType

from hf_zocl.checks import alternatives
from hf_zocl.commands import command
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from hf_zocl.continual.run_arguments import DTYPES, LEARNING, RunArguments
from hf_zocl.models import AdapterArguments
from hf_zocl.trainer.arguments import ZOCLTrainingArguments
from hf_zocl.zo import ESTIMATORS
from hf_zocl.zo.assignment import BRANCHES
from hf_zocl.zo.optimizer import ZO_OPTIMIZERS
from tests.helpers import small_clip


pytestmark = pytest.mark.usefixtures("quick_pictures")
QUICKSTART = Path(__file__).resolve().parents[2] / "scripts" / "recipes" / "quickstart.yaml"
SMALL = {
    "include": str(QUICKSTART),
    "increment": 5,
    "max_train_images_per_class": 2,
    "max_test_images_per_class": 2,
    "max_steps": 1,
    "classifier_alignment": 1,
    "zo_queries": {"vision": 1, "language": 2},
    "disable_tqdm": True,
    "save_strategy": "no",
}
# What reaches out, starts processes, or says where a run is written.
LEFT_ALONE = {
    *("output_dir", "push_to_hub", "deepspeed", "fsdp", "fsdp_config", "report_to", "log_level", "log_level_replica"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "dataloader_num_workers", "use_liger_kernel"),
    *("dataset_name", "datasets", "model_name_or_path", "seeds", "num_seeds", "full_determinism", "disable_tqdm"),
    "merge_into",
}
ARGUMENTS = sorted(
    {
        each.name
        for cls in (RunArguments, AdapterArguments, ZOCLTrainingArguments)
        for each in fields(cls)
        if each.init and not each.name.startswith(("hub_", "trackio_", "ddp_"))
    }
    - LEFT_ALONE
)
# As text of YAML, so that its own guesses are among them.
VALUES = st.sampled_from(
    "yes no null ~ true off 0 1 -1 2 8.0 1.5 -0.5 1e3 1e-3 .inf -.inf .nan inf nan 1e999 2024-01-01 0x10 0o7 1_000 "
    "99999999999999999999999999 -99999999999999999999999999 hop-odd all none auto [] [1,2] [yes,null] {} {a:_1} "
    "'' 'x' 'a_{}' 'a_{}_{}' '{' '*(' \"\\ud800\" \"\\0\" !!python/none_x &a_1 '../..' /nowhere".split()
).map(lambda text: text.replace("_1", " 1").replace("_", " ") if "_000" not in text else text)
WRONG_KEYS = st.sampled_from(["lora_rnk", "no", "1", "2024-01-01", "~", "[1]", "zo-branch", "<<", "include"])
_HINTS = {
    name: alternatives(hint)
    for cls in (RunArguments, AdapterArguments, ZOCLTrainingArguments)
    for name, hint in get_type_hints(cls).items()
}
# Of texts from closed sets; what an argument does not know is refused.
WORDS = {
    "preset": ("mozo", "mezo", "fzoo", "zo-adam", "all-zo", "hybrid"),
    "zo_branch": BRANCHES,
    "zo_layers": ("all", "hop-odd", "suffix-2", "2"),
    "zo_estimator": tuple(ESTIMATORS),
    "zo_optim": ZO_OPTIMIZERS,
    "zo_queries": ("1", "2", "vision=1,language=2", "{vision: 1}"),
    "zo_eps": ("auto", "1e-2", "vision=auto,language=1e-3"),
    "zo_learning_rate": ("1e-3", "{vision: 1e-4, language: 1e-3}"),
    "adapter": ("lora", "moe"),
    "scenario": ("class", "task"),
    "learning": LEARNING,
    "dtype": DTYPES,
    "optim": ("adamw_torch", "sgd", "adafactor", "rmsprop"),
    "lr_scheduler_type": [kind.value for kind in SchedulerType],
}


def plausible(key: str) -> st.SearchStrategy[str]:
    """Values of the argument's own type, that reach further in."""
    kinds = _HINTS[key]
    if key in WORDS:
        return st.sampled_from(list(WORDS[key]))
    if bool in kinds:
        return st.sampled_from(["true", "false"])
    if int in kinds:
        return st.sampled_from(["1", "2", "3", "5", "17"])
    return st.sampled_from(["0.5", "1", "3", "1e-4"]) if float in kinds else VALUES


@st.composite
def mutation(draw) -> tuple[str, str]:
    kind = draw(st.integers(0, 9))
    if kind == 9:
        return draw(WRONG_KEYS), draw(VALUES)
    key = draw(st.sampled_from(ARGUMENTS))
    return key, draw(VALUES if kind > 5 else plausible(key))


MUTATIONS = st.lists(mutation(), min_size=1, max_size=3, unique_by=lambda one: one[0])
RUNS = settings(
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
    database=None,
)


def mutated(folder: Path, mutations: list[tuple[str, str]]) -> Path:
    keys = {key for key, _ in mutations}
    small = {**SMALL, "model_name_or_path": small_clip()}
    kept = {key: value for key, value in small.items() if key not in keys}
    text = yaml.safe_dump(kept) + "".join(f"{key}: {value}\n" for key, value in mutations)
    recipe = folder / "recipe.yaml"
    recipe.write_text(text, encoding="utf-8")
    return recipe


def try_recipe(folder: Path, mutations: list[tuple[str, str]], how_far: str) -> str:
    """`ran`, or the one line that the command ended in."""
    recipe = mutated(folder, mutations)

    @command
    def main() -> None:
        parsed = parse_recipe(["--recipe", str(recipe), "--output_dir", str(folder / "run")])
        if how_far == "parse":
            return
        scheduler = build_scheduler(parsed)
        if how_far == "run":
            with parsed.placing():
                scheduler.run()

    before = {name: os.environ.get(name) for name in ("ACCELERATE_MIXED_PRECISION", "TORCH_SHOW_CPP_STACKTRACES")}
    try:
        main()
    except SystemExit as end:
        line = str(end.code)
        assert line.startswith("error: ") and "\n" not in line and len(line) < 2000, line
        return line
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    return "ran"


def test_the_recipe_itself_runs_its_first_step(tmp_path):
    assert try_recipe(tmp_path, [], "run") == "ran"
    assert (tmp_path / "run" / "task-02" / "task.json").is_file()


@pytest.mark.slow
@seed(1993)
@settings(RUNS, max_examples=150)
@given(MUTATIONS)
def test_a_mutated_recipe_is_read_or_refused_in_one_line(tmp_path_factory, mutations):
    try_recipe(tmp_path_factory.mktemp("recipe"), mutations, "parse")


@seed(1996)
@settings(RUNS, max_examples=12)
@given(MUTATIONS)
def test_a_mutated_recipe_builds_its_run_or_is_refused_in_one_line(tmp_path_factory, mutations):
    try_recipe(tmp_path_factory.mktemp("recipe"), mutations, "build")


@pytest.mark.slow
def test_300_mutated_recipes_run_their_first_step_or_end_in_one_line(tmp_path_factory):
    ends = []

    @seed(1997)
    @settings(RUNS, max_examples=300)
    @given(MUTATIONS)
    def try_each(mutations):
        ends.append(try_recipe(tmp_path_factory.mktemp("recipe"), mutations, "run"))

    try_each()
    assert len(ends) == 300 and 30 <= ends.count("ran") <= 270


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr_scheduler_type", "warmup_stable_decay"),
        ("eval_do_concat_batches", "false"),
        ("batch_eval_metrics", "true"),
        ("prediction_loss_only", "true"),
        ("label_names", "[x]"),
        ("neftune_noise_alpha", "1"),
    ],
)
def test_what_would_break_far_away_is_refused_before_any_work(tmp_path, argument, value):
    line = try_recipe(tmp_path, [(argument, value)], "build")
    assert line.startswith(f"error: {argument}=") and f"({argument}: {tmp_path}/recipe.yaml, line " in line


def refusal(tmp_path: Path, text: str) -> str:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"include: {QUICKSTART}\n{text}\n", encoding="utf-8")
    with pytest.raises(ValueError) as error:
        parse_recipe(["--recipe", str(recipe)])
    return str(error.value).replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("lora_rank: 8.5", "/r.yaml, line 2: lora_rank: expected a whole number, got '8.5'."),
        ("lora_rank: null", "/r.yaml, line 2: lora_rank: expected a whole number, got 'null'."),
        ("seed: 2024-01-01", "/r.yaml, line 2: seed: expected a whole number, got '2024-01-01'."),
        ("seed: [1, 2]", "/r.yaml, line 2: seed: expected a whole number, got a list."),
        ("bf16: maybe", "/r.yaml, line 2: bf16: expected true or false, got 'maybe'."),
        ("seed: 3\n\nseed: 4", "/r.yaml, line 4: seed is given twice, first in /r.yaml, line 2."),
        ("seed: 3\n  lora_rank: 4", "/r.yaml, line 3: this is not valid YAML: mapping values are not allowed here."),
        ("lora_rnk: 4", "/r.yaml, line 2: unknown argument 'lora_rnk'. Did you mean 'lora_rank'?"),
        ("no: 4", "/r.yaml, line 2: unknown argument 'no'."),
        ("lora_rank: 0", "lora_rank=0: expected at least 1 and at most 16384. (lora_rank: /r.yaml, line 2)"),
        ("seed: -1", "seed=-1: expected 0 to 4294967295. (seed: /r.yaml, line 2)"),
        ("learning_rate: .nan", "learning_rate: expected a number, got '.nan'."),
        ("learning_rate: 1e999", "learning_rate=inf: expected a finite number. (learning_rate: /r.yaml, line 2)"),
        ('prompt_template: "a {kind} photo of a {}."', "and no other brace. (prompt_template: /r.yaml, line 2)"),
        ("class_names: ['a', \"\\ud800\"]", "class_names[1]='\\ud800': it contains half a character"),
    ],
)
def test_a_refusal_names_the_value_the_place_and_what_was_expected(tmp_path, text, line):
    assert line in refusal(tmp_path, text)


def test_a_value_means_what_its_argument_makes_of_it(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "class_names: [airplane, yes, no, null, 2024-01-01, 1e3, 007]\nlora_rank: 8.0\nseed: 1e3\nrun_name: null\n"
        "save_strategy: no\nbf16: off\nlearning_rate: 1e-3\ntarget_modules: q_proj\n"
        "adapter_config: {layers_to_transform: [2, 4]}\n"
        "prompt_template: a photo of a {}.\nseeds: 1,2\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    parsed = parse_recipe(["--recipe", str(recipe), "--output_dir", str(tmp_path)])
    assert parsed.run.class_names == ["airplane", "yes", "no", "null", "2024-01-01", "1e3", "007"]
    assert (parsed.adapter.lora_rank, parsed.training.seed) == (8, 1000)
    assert parsed.training.run_name in (None, str(tmp_path))
    assert str(parsed.training.save_strategy.value) == "no" and parsed.training.bf16 is False
    assert parsed.training.learning_rate == 1e-3
    assert parsed.adapter.adapter_config == {"layers_to_transform": [2, 4]} and parsed.adapter.target_modules == [
        "q_proj"
    ]
    assert parsed.run.prompt_template == "a photo of a {}." and parsed.run.seed_list(0) == [1, 2]
    assert parsed.training.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(("text", "number"), [("1e-5", 1e-5), ("-2E+3", -2000.0), (".5e0", 0.5), ("1.5e-1", 0.15)])
def test_a_number_in_a_mapping_is_a_number(tmp_path, text, number):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"lr_scheduler_kwargs: {{min_lr: {text}, note: e5, quoted: '{text}'}}\nzo_learning_rate: {{vision: 1e-3}}\n"
    )
    parsed = parse_recipe(["--recipe", str(recipe), "--output_dir", str(tmp_path)])
    assert parsed.training.lr_scheduler_kwargs == {"min_lr": number, "note": "e5", "quoted": text}
    assert parsed.training.zo_learning_rate == {"vision": 1e-3, "language": "auto"}


def test_an_argument_on_the_command_line_is_not_blamed_on_the_recipe(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lora_rank: 4\n")
    with pytest.raises(ValueError, match="^lora_rank=0: expected at least 1 and at most 16384.$"):
        parse_recipe(["--recipe", str(recipe), "--lora_rank", "0"])
    for argv, message in (
        (["--lora_rnk", "4"], "^unknown argument '--lora_rnk'. Did you mean --lora_rank?"),
        (["--seed", "x"], "--seed.*'x'"),
        (["--bf16", "maybe"], "maybe"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_recipe(argv)


def test_a_bare_debug_asks_for_the_traceback_and_a_bug_has_one_always(monkeypatch, capsys):
    @command
    def refused() -> None:
        raise ValueError("zo_queries=0:\nexpected more")

    @command
    def broken() -> None:
        raise KeyError("a bug")

    @command
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit, match="^error: zo_queries=0: expected more"):
        refused()
    with pytest.raises(KeyError):
        broken()
    with pytest.raises(SystemExit) as end:
        stopped()
    assert end.value.code == 130 and capsys.readouterr().err == "error: interrupted\n"
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug", "--seed", "1"])
    with pytest.raises(ValueError):
        refused()
    assert sys.argv == ["train.py", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug", "underflow_overflow"])
    with pytest.raises(SystemExit):
        refused()
    assert sys.argv == ["train.py", "--debug", "underflow_overflow"]
