"""Presets: what each sets, what overrides it, and that it trains."""

from pathlib import Path

import pytest
import torch

import hf_zocl.commands
from hf_zocl.commands.recipe import parse_recipe
from tests.helpers import image_examples, mini_clip_classifier, train, training_logs


PRESETS = {
    "mozo": {
        "zo_branch": "dual", "zo_layers": "hop-even", "zo_estimator": "one-sided", "zo_sign": True, "zo_optim": "sgd",
        "zo_momentum": 0.9, "zo_learning_rate": 3e-3,
    },
    "mezo": {
        "zo_branch": "dual", "zo_layers": "all", "zo_estimator": "two-sided", "zo_sign": False, "zo_optim": "sgd",
        "zo_momentum": 0.0, "zo_learning_rate": 5e-2,
    },
    "fzoo": {
        "zo_branch": "dual", "zo_layers": "all", "zo_estimator": "fzoo", "zo_sign": False, "zo_optim": "sgd",
        "zo_momentum": 0.0, "zo_learning_rate": 5e-3,
    },
    "zo-adam": {
        "zo_branch": "dual", "zo_layers": "all", "zo_estimator": "one-sided", "zo_sign": False, "zo_optim": "adamw",
        "zo_momentum": 0.0, "zo_learning_rate": 2e-2,
    },
    "all-zo": {
        "zo_branch": "dual", "zo_layers": "all", "zo_estimator": "one-sided", "zo_sign": False, "zo_optim": "sign",
        "zo_momentum": 0.9, "zo_learning_rate": "auto",
    },
    "hybrid": {
        "zo_branch": "dual", "zo_layers": ["post_layernorm", "final_layer_norm"], "zo_estimator": "one-sided",
        "zo_sign": False, "zo_optim": "sign", "zo_momentum": 0.9, "zo_learning_rate": "auto",
    },
}  # fmt: skip
QUERIES = {"mozo": 1, "mezo": 1, "fzoo": 8, "zo-adam": 2, "all-zo": 256, "hybrid": 256}
FILES = Path(hf_zocl.commands.__file__).parent / "presets"


def parse(tmp_path: Path, text: str = "", *arguments: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"output_dir: {tmp_path / 'run'}\nreport_to: none\n{text}", encoding="utf-8")
    return parse_recipe(["--recipe", str(file), *arguments])


def queries(recipe) -> tuple[int, int]:
    by_branch = recipe.training.queries_by_branch
    return by_branch["vision"], by_branch["language"]


def test_every_preset_sets_the_same_arguments_so_that_nothing_of_another_is_left():
    assert {file.stem for file in FILES.glob("*.yaml")} == set(PRESETS)
    texts = [file.read_text(encoding="utf-8").splitlines() for file in FILES.glob("*.yaml")]
    keys = [{line.split(":")[0] for line in text if line and not line.startswith("#")} for text in texts]
    common = set.intersection(*keys)
    assert {key for key in common if not key.startswith("zo_")} == set()
    # Two presets choose the adapter too; a preset takes the place of another as a whole.
    own = {file.stem: each - common for file, each in zip(FILES.glob("*.yaml"), keys, strict=True) if each != common}
    adapter = {"adapter", "adapter_config"}
    assert own == {"all-zo": {*adapter, "frozen_parameters"}, "hybrid": adapter}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_it_says_in_a_recipe_and_on_the_command_line(name, tmp_path):
    for recipe in (parse(tmp_path, f"preset: {name}\n"), parse(tmp_path, "", "--preset", name)):
        assert {key: getattr(recipe.training, key) for key in PRESETS[name]} == PRESETS[name]
        assert queries(recipe) == (QUERIES[name], QUERIES[name])
        assert set(recipe.training.eps_by_branch.values()) == {None}  # measured
        assert recipe.to_dict()["preset"] == name


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_given_beside_a_preset_overrides_it(name, tmp_path):
    beside = parse(tmp_path, f"zo_learning_rate: 7e-4\nzo_queries: 4\npreset: {name}\n")
    assert (beside.training.zo_learning_rate, queries(beside)) == (7e-4, (4, 4))
    above = parse(tmp_path, f"preset: {name}\n", "--zo_learning_rate", "7e-4", "--zo_queries", "4")
    assert (above.training.zo_learning_rate, queries(above)) == (7e-4, (4, 4))
    alone = parse(tmp_path, "", "--preset", name, "--zo_momentum", "0.5", "--zo_queries", "vision=3,language=9")
    assert (alone.training.zo_momentum, queries(alone)) == (0.5, (3, 9))
    assert alone.training.zo_estimator == PRESETS[name]["zo_estimator"]


def test_a_preset_on_the_command_line_overrides_the_whole_recipe_towers_included(tmp_path):
    """`--recipe quickstart --preset mezo` is MeZO, of the recipe's model and stream."""
    recipe = parse_recipe(["--recipe", "quickstart", "--preset", "mezo"])
    assert {key: getattr(recipe.training, key) for key in PRESETS["mezo"]} == PRESETS["mezo"]
    assert (queries(recipe), recipe.adapter.lora_rank, recipe.training.num_train_epochs) == ((1, 1), 8, 1)
    other = parse(tmp_path, "preset: mozo\nzo_sign: true\n", "--preset", "zo-adam")
    assert (other.training.zo_optim, other.training.zo_sign, other.run.preset) == ("adamw", False, "zo-adam")


def test_a_preset_overrides_what_a_recipe_includes(tmp_path):
    recipe = parse(tmp_path, "include: quickstart\npreset: all-zo\nzo_layers: hop-odd\n")
    assert (recipe.training.zo_sign, recipe.training.zo_layers, queries(recipe)) == (False, "hop-odd", (256, 256))


@pytest.mark.parametrize("above", ["include", "--preset"])
def test_of_two_presets_nothing_of_the_lower_one_is_left(above, tmp_path):
    """Not even its adapter, of which the upper one says nothing."""
    (tmp_path / "lower.yaml").write_text(f"output_dir: {tmp_path / 'run'}\npreset: all-zo\n")
    lower = parse_recipe(["--recipe", str(tmp_path / "lower.yaml")])
    assert (lower.adapter.adapter, lower.adapter.frozen_parameters) == ("ln_tuning", ["vision_model.encoder"])
    text, more = (
        ("include: lower.yaml\npreset: mezo\n", ())
        if above == "include"
        else ("preset: all-zo\n", ("--preset", "mezo"))
    )
    upper = parse(tmp_path, text, *more)
    assert (upper.adapter.adapter, upper.adapter.adapter_config, upper.adapter.frozen_parameters) == (
        "lora",
        None,
        None,
    )
    assert (upper.run.preset, upper.training.zo_estimator) == ("mezo", "two-sided")


def test_one_value_on_the_command_line_replaces_the_towers_own_in_the_recipe(tmp_path):
    assert queries(parse(tmp_path, "zo_queries: {vision: 2, language: 16}\n", "--zo_queries", "4")) == (4, 4)


def test_an_unknown_preset_is_one_line_that_lists_them(tmp_path):
    names = ", ".join(sorted(PRESETS))
    with pytest.raises(ValueError, match=f"^--preset mezzo: there is no such preset: expected one of {names}.$"):
        parse(tmp_path, "", "--preset", "mezzo")
    with pytest.raises(ValueError, match=f"recipe.yaml, line 3: preset='mezzo': .* expected one of {names}"):
        parse(tmp_path, "preset: mezzo\n")


def test_a_wrong_value_beside_a_preset_says_where_both_stand(tmp_path):
    with pytest.raises(ValueError, match=r"zo_queries=1: zo_estimator='fzoo' needs .*fzoo.yaml, line \d+"):
        parse(tmp_path, "preset: fzoo\nzo_queries: 1\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains(name, tmp_path):
    recipe = parse(tmp_path, f"preset: {name}\n")
    arguments = {key: getattr(recipe.training, key) for key in (*PRESETS[name], "zo_queries", "zo_eps")}
    own = ("adapter", "adapter_config", "frozen_parameters")
    model = mini_clip_classifier(**{key: getattr(recipe.adapter, key) for key in own})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = train(tmp_path, model, max_steps=1, data=image_examples(8), **arguments)
    assert bool(trainer.split.fo) == (name in ("mozo", "hybrid"))
    assert torch.isfinite(torch.tensor(training_logs(trainer)[0]["loss"]))
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert all(any(tower in key for key in moved) for tower in ("vision_model", "text_model"))
    assert any("vision_model.encoder" in key for key in moved) == (name != "all-zo")
