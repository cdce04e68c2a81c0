"""A training that stopped and goes on from a checkpoint is one that never stopped."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_zocl import ZOCLTrainer
from hf_zocl.resumable import WRITE_ERRORS, SaveError, last_checkpoint
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


def test_what_no_room_would_mend_is_not_called_a_full_disk():
    text = str(SaveError("out/checkpoint-1", RuntimeError("Some tensors share memory.\nMore.")))
    assert "Some tensors share memory. What was saved before is whole: go on with --resume" in text
    assert "room" not in text and "MB" not in text
    advice = "MB are free there. What was saved before is whole: make room, then go on"
    assert advice in str(SaveError("out/checkpoint-1", OSError(28, "No space left on device")))


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
def test_a_full_disk_is_known_by_what_torch_says():
    with pytest.raises(WRITE_ERRORS) as raised:
        torch.save({"a": torch.ones(5)}, "/dev/full")
    assert "make room, then go on" in str(SaveError("out/checkpoint-1", raised.value))


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
    "no manifest": ("manifest.json", Path.unlink, "it is not finished"),
    "a damaged manifest": ("manifest.json", lambda file: file.write_text("[1]"), "manifest.json is damaged"),
    "an empty manifest": (
        "manifest.json",
        lambda file: file.write_text('{"files": {}}'),
        "it was saved without trainer_state",
    ),
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
    assert f"{folder / 'checkpoint-5'} is passed over for one before it: {message}" in caplog.text
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
