"""A training that stopped and goes on from a checkpoint is one that never stopped."""

import errno
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hf_zocl import ZOCLTrainer
from hf_zocl.trainer.resumable import MANIFEST_FILE, ResumeError, SaveError, _write_manifest, last_checkpoint
from tests.helpers import Mlp, arguments, rows, train, training_logs


def test_resuming_from_a_trainer_checkpoint_goes_on_to_the_same_weights(tmp_path):
    options = {"zo_layers": [1], "zo_optim": "adamw", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path, Mlp(), data=rows(), **options)
    resumed = ZOCLTrainer(model=Mlp(), args=arguments(tmp_path, **options), train_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


SAVING = {"zo_layers": [1], "save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "max_steps": 5}


def resumed(tmp_path, model, checkpoint: str) -> ZOCLTrainer:
    trainer = ZOCLTrainer(model=model, args=arguments(tmp_path, **SAVING), train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "trainer" / checkpoint))
    return trainer


def test_a_resumed_training_logs_what_the_undisturbed_one_does(tmp_path):
    whole = train(tmp_path, Mlp(), data=rows(), **SAVING)
    again = resumed(tmp_path, Mlp(), "checkpoint-2")
    assert training_logs(again) == training_logs(whole)
    assert again.earlier_seconds > 0


def test_a_training_that_was_saved_after_its_last_step_takes_no_further_one(tmp_path):
    whole = train(tmp_path, Mlp(), data=rows(), **SAVING)
    again = resumed(tmp_path, Mlp(), "checkpoint-5")
    assert again.state.global_step == 5
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))


def test_true_resumes_from_the_last_checkpoint_that_is_whole(tmp_path):
    train(tmp_path, Mlp(), data=rows(), **SAVING)
    folder = tmp_path / "trainer"
    (folder / "checkpoint-5" / "trainer_state.json").write_text('{"global_step": 5')
    (folder / "checkpoint-4" / "scheduler.pt").unlink()
    assert last_checkpoint(folder) == folder / "checkpoint-2"
    trainer = ZOCLTrainer(model=Mlp(), args=arguments(tmp_path, **SAVING), train_dataset=rows())
    trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == 2


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_training_that_is_run_again_leaves_what_others_put_into_its_checkpoints(tmp_path, is_ours):
    train(tmp_path, Mlp(), data=rows(), **SAVING)
    folder = tmp_path / "trainer" / "checkpoint-2"
    for name in ("notes.txt", "samples/1.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    if not is_ours:  # saved by a plain Trainer
        (folder / MANIFEST_FILE).unlink()
    for _ in range(2):
        train(tmp_path, Mlp(), data=rows(), **SAVING)
        assert [(folder / name).read_text() for name in ("notes.txt", "samples/1.txt")] == [
            "notes.txt",
            "samples/1.txt",
        ]
    assert "notes.txt" not in (folder / MANIFEST_FILE).read_text()
    assert "model.safetensors" in (folder / MANIFEST_FILE).read_text()
    assert resumed(tmp_path, Mlp(), "checkpoint-2").state.global_step == 5


def test_a_checkpoint_leaves_out_what_is_frozen_and_is_refused_where_more_is_missing(tmp_path):
    model = Mlp()
    model.layers[1].bias.requires_grad_(False)
    train(tmp_path, model, data=rows(), **SAVING)
    saved = load_file(tmp_path / "trainer" / "checkpoint-2" / "model.safetensors")
    assert sorted(saved) == ["layers.0.bias", "layers.0.weight", "layers.1.weight"]
    with pytest.raises(ValueError, match=r"another model: missing \['layers.1.bias'\], unexpected nothing"):
        resumed(tmp_path, Mlp(), "checkpoint-2")


def test_a_log_of_steps_does_not_go_on_under_other_arguments(tmp_path, caplog):
    options = {"zo_layers": "all", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    train(tmp_path, Mlp(), data=rows(), **options)
    checkpoint = str(tmp_path / "trainer" / "checkpoint-2")
    logging.getLogger("transformers").propagate = logging.getLogger("hf_zocl").propagate = True
    for other, kept in (({}, True), ({"zo_queries": 3}, False), ({"zo_momentum": 0.5}, False)):
        trainer = ZOCLTrainer(model=Mlp(), args=arguments(tmp_path, **options, **other), train_dataset=rows())
        trainer.train(resume_from_checkpoint=checkpoint)
        assert (trainer.replay_log is not None) == kept
    assert "its steps were taken under other arguments" in caplog.text


class Breaks(ZOCLTrainer):
    error: Exception

    def _save_rng_state(self, output_dir):
        raise self.error


def broken(tmp_path, error: Exception) -> ZOCLTrainer:
    trainer = Breaks(model=Mlp(), args=arguments(tmp_path, **SAVING), train_dataset=rows())
    trainer.error = error
    return trainer


@pytest.mark.parametrize(
    "text", ["CUDA error: an illegal memory access was encountered", "inline_container: No space left on device"]
)
def test_an_error_that_is_none_of_the_disks_stays_what_it_is(tmp_path, text):
    with pytest.raises(RuntimeError, match=text) as raised:
        broken(tmp_path, RuntimeError(text)).train()
    assert not isinstance(raised.value, SaveError)
    assert not (tmp_path / "trainer" / "checkpoint-2").exists()


def test_any_error_on_a_full_disk_is_for_want_of_room(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, used=1 << 40, free=4096))
    with pytest.raises(SaveError, match="No space left on device. 0 MB are free there. .* make room, then go on"):
        broken(tmp_path, RuntimeError("unexpected pos 64 vs 0")).train()
    assert not (tmp_path / "trainer" / "checkpoint-2").exists()


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG])
def test_a_quota_is_known_by_its_number_and_is_no_full_disk(tmp_path, number):
    with pytest.raises(SaveError, match="What was saved before is whole: make room, then go on") as raised:
        broken(tmp_path, OSError(number, "")).train()
    assert "MB are free" not in str(raised.value)


def test_what_no_room_would_mend_asks_for_none(tmp_path):
    with pytest.raises(SaveError, match="Permission denied. What was saved before is whole: go on with --resume"):
        broken(tmp_path, OSError(errno.EACCES, "Permission denied")).train()


@pytest.mark.parametrize("options", [{"zo_branch": "none"}, {"zo_layers": [2]}])
def test_without_zeroth_order_layers_a_checkpoint_holds_what_the_trainers_does(tmp_path, options):
    model, plain = Mlp(), Mlp()
    for one in (model, plain):
        one.layers[0].requires_grad_(False)
    train(tmp_path / "ours", model, data=rows(), **{**SAVING, **options})
    del (saving := dict(SAVING))["zo_layers"]
    train(tmp_path / "plain", plain, data=rows(), trainer_class=Trainer, cls=TrainingArguments, **saving)
    ours, theirs = (
        load_file(tmp_path / name / "trainer" / "checkpoint-2" / "model.safetensors") for name in ("ours", "plain")
    )
    kept = {name for name in theirs if options.get("zo_branch") == "none" or name.startswith("layers.1")}
    assert ours.keys() == kept
    if "zo_branch" in options:
        assert all(torch.equal(ours[name], theirs[name]) for name in kept)


def test_a_classifiers_checkpoint_holds_its_adapter_alone(tmp_path):
    train(tmp_path, zo_branch="none", max_steps=1, save_strategy="steps", save_steps=1)
    saved = load_file(tmp_path / "trainer" / "checkpoint-1" / "model.safetensors")
    assert saved and all("lora_" in name for name in saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_device_train_batch_size": 4}, "8 examples a step, and this training has 4"),
        ({"gradient_accumulation_steps": 2}, "8 examples a step, and this training has 16"),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, None),
    ],
)
def test_another_number_of_examples_a_step_is_refused_by_name(tmp_path, options, message):
    train(tmp_path, Mlp(), data=rows(), **SAVING)
    trainer = ZOCLTrainer(model=Mlp(), args=arguments(tmp_path, **{**SAVING, **options}), train_dataset=rows())
    checkpoint = str(tmp_path / "trainer" / "checkpoint-2")
    if message is None:
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 5
        return
    with pytest.raises(ResumeError, match=message):
        trainer.train(resume_from_checkpoint=checkpoint)


def other_processes(checkpoint: Path, recorded: bool, names: list[str]) -> None:
    """Make a checkpoint look like one of other processes."""
    state = (checkpoint / "rng_state.pth").read_bytes()
    progress = load_file(checkpoint / "progress.safetensors")
    for file in ("rng_state.pth", "progress.safetensors"):
        (checkpoint / file).unlink()
    for name in names:
        (checkpoint / name).write_bytes(state)
    if recorded:
        save_file({**progress, "processes": torch.tensor(4)}, checkpoint / "progress.safetensors")
        _write_manifest(checkpoint, {})
    else:  # which another Trainer does not write
        (checkpoint / MANIFEST_FILE).unlink()


@pytest.mark.parametrize("recorded", [True, False], ids=["of this trainer", "of another"])
def test_the_checkpoint_of_another_number_of_processes_is_refused(tmp_path, recorded):
    train(tmp_path, Mlp(), data=rows(), **SAVING)
    checkpoint = tmp_path / "trainer" / "checkpoint-2"
    other_processes(checkpoint, recorded, [f"rng_state_{rank}.pth" for rank in range(4)])
    trainer = ZOCLTrainer(model=Mlp(), args=arguments(tmp_path, **SAVING), train_dataset=rows())
    with pytest.raises(ResumeError, match="was saved by 4 processes, and this training has 1 process: expected 4"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "no optimizer": ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
    "no random state": ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
    "no progress": ("progress.safetensors", Path.unlink, "progress.safetensors is missing"),
    "a changed weight": ("model.safetensors", spoil, "model.safetensors is damaged"),
    "a changed state": ("trainer_state.json", spoil, "trainer_state.json is damaged"),
    "no manifest": ("manifest.json", Path.unlink, "it is unfinished"),
    "a damaged manifest": ("manifest.json", lambda file: file.write_text("[1]"), "manifest.json is damaged"),
    "an empty manifest": ("manifest.json", lambda file: file.write_text('{"files": {}}'), "it is unfinished"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(damage, tmp_path, caplog):
    logging.getLogger("hf_zocl").propagate = True
    train(tmp_path, Mlp(), data=rows(), **SAVING)
    name, spoiling, message = DAMAGES[damage]
    folder = tmp_path / "trainer"
    assert last_checkpoint(folder) == folder / "checkpoint-5"
    spoiling(folder / "checkpoint-5" / name)
    assert last_checkpoint(folder) == folder / "checkpoint-4"
    assert f"{folder / 'checkpoint-5'} is skipped for an earlier checkpoint: {message}" in caplog.text
    with pytest.raises(ValueError, match=f"checkpoint-5': .*{message}"):
        resumed(tmp_path, Mlp(), "checkpoint-5")


def test_the_checkpoint_before_is_removed_once_the_next_one_is_whole(tmp_path, monkeypatch):
    from transformers import trainer as transformers_trainer

    rotate, whole = transformers_trainer.rotate_checkpoints, []

    def look(output_dir, **options):
        whole.append(last_checkpoint(output_dir).name)
        return rotate(output_dir=output_dir, **options)

    monkeypatch.setattr(transformers_trainer, "rotate_checkpoints", look)
    train(tmp_path, Mlp(), data=rows(), **SAVING, save_total_limit=1)
    assert whole == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert [path.name for path in (tmp_path / "trainer").glob("checkpoint-*")] == ["checkpoint-5"]


def prompted(config):
    """A language model that learns virtual tokens, and what it learns from."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=0, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))
    ids = [torch.arange(6).roll(number) for number in range(32)]
    return get_peft_model(model, config), [{"input_ids": each, "labels": each} for each in ids]


TOKENS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}


@pytest.mark.parametrize(
    "config",
    [PromptEncoderConfig(**TOKENS, encoder_hidden_size=8), PrefixTuningConfig(**TOKENS, prefix_projection=True)],
    ids=["p-tuning", "projected prefix"],
)
def test_a_training_whose_adapter_peft_saves_in_part_cannot_go_on(config, tmp_path, caplog):
    logging.getLogger("hf_zocl").propagate = True
    model, data = prompted(config)
    options = {**SAVING, "zo_layers": "all"}
    train(tmp_path, model, data=data, **options)
    assert "Training cannot go on from the checkpoints of this run: PEFT does not save prompt_encoder" in caplog.text
    model, data = prompted(config)
    again = ZOCLTrainer(model=model, args=arguments(tmp_path, **options), train_dataset=data)
    with pytest.raises(ResumeError, match="checkpoint-2: PEFT does not save prompt_encoder.*which is trained, so the"):
        again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))


def test_a_training_of_virtual_tokens_goes_on_to_the_same_weights(tmp_path, caplog):
    logging.getLogger("hf_zocl").propagate = True
    options = {**SAVING, "zo_layers": "all"}
    (model, data), (other, _) = (prompted(PromptTuningConfig(**TOKENS)) for _ in range(2))
    train(tmp_path, model, data=data, **options)
    again = ZOCLTrainer(model=other, args=arguments(tmp_path, **options), train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert "PEFT does not save" not in caplog.text


@pytest.mark.parametrize(("before", "now"), [("sgd", "adamw"), ("adamw", "sign"), ("sign", "sgd"), ("sgd", "sign")])
def test_another_rule_does_not_go_on_with_the_state_of_the_first(tmp_path, before, now):
    options = {**SAVING, "zo_layers": "all", "zo_learning_rate": 1e-3}
    train(tmp_path, Mlp(), data=rows(), zo_optim=before, **options)
    trainer = ZOCLTrainer(model=Mlp(), args=arguments(tmp_path, zo_optim=now, **options), train_dataset=rows())
    with pytest.raises(ValueError, match=f"saved with another zo_optim than the current one: '{before}', not '{now}'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))


@pytest.mark.parametrize(("before", "now"), [("one-sided", "two-sided"), ("two-sided", "one-sided")])
def test_another_estimator_measures_its_own_eps(tmp_path, before, now):
    options = {**SAVING, "zo_layers": "all", "zo_learning_rate": 1e-3}
    fresh = train(tmp_path / "fresh", Mlp(), data=rows(), zo_estimator=now, **options)
    train(tmp_path, Mlp(), data=rows(), zo_estimator=before, **options)
    trainer = ZOCLTrainer(model=Mlp(), args=arguments(tmp_path, zo_estimator=now, **options), train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))
    expected, found = (training_logs(each)[-1]["zo_eps"] for each in (fresh, trainer))
    assert found == pytest.approx(expected, rel=0.5)


class RandomFeatures(Mlp):
    """An `nn.Module` with frozen weights, which its checkpoints leave out."""

    def __init__(self, seed: int):
        super().__init__()
        self.layers[1].requires_grad_(False)
        torch.nn.init.normal_(self.layers[1].weight, generator=torch.Generator().manual_seed(seed))


def test_other_frozen_weights_than_the_checkpoint_leaves_out_are_refused(tmp_path):
    whole = train(tmp_path, RandomFeatures(0), data=rows(), **SAVING)
    again = resumed(tmp_path, RandomFeatures(0), "checkpoint-2")
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True))
    with pytest.raises(
        ResumeError, match="leaves out the frozen weights of RandomFeatures, and they have changed since"
    ):
        resumed(tmp_path, RandomFeatures(1), "checkpoint-2")


def with_adapters(active: list[str]):
    """A language model with two adapters, and what it learns from."""
    config = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", init_lora_weights=False)
    model, data = prompted(config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(active)
    return model, data


def adapters_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def same(some: dict, others: dict) -> bool:
    return all(torch.equal(value, others[name]) for name, value in some.items())


@pytest.mark.parametrize("active", [["default"], ["second"], ["default", "second"]], ids=str)
def test_every_adapter_goes_on_and_comes_back_as_the_best(tmp_path, active):
    options = {**SAVING, "zo_layers": "all", "max_steps": 4}
    model, data = with_adapters(active)
    train(tmp_path, model, data=data, **options)
    other, _ = with_adapters(active)
    again = ZOCLTrainer(model=other, args=arguments(tmp_path, **options), train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-2"))
    assert same(adapters_of(model), adapters_of(other))

    seen = {}

    class Evaluates(ZOCLTrainer):
        def evaluate(self, *args, **kwargs):
            seen[self.state.global_step] = adapters_of(self.model)
            self.log(found := {"eval_step": self.state.global_step})
            return found

    best = {"load_best_model_at_end": True, "metric_for_best_model": "step", "greater_is_better": False}
    args = arguments(tmp_path, **options, **best, eval_strategy="steps", eval_steps=2)
    model, data = with_adapters(active)
    Evaluates(model, args, train_dataset=data, eval_dataset=data).train()
    assert list(model.active_adapters) == active
    assert same(seen[2], adapters_of(model))
    assert not same(seen[4], adapters_of(model))
