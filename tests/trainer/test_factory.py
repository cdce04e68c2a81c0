"""`zeroth_order`: classes that are made, and found again where they are unpickled."""

import pickle
import subprocess
import sys

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_zocl import ZeroOrderArguments, ZeroOrderMixin, ZOCLTrainer, ZOCLTrainingArguments, zeroth_order
from tests.helpers import Mlp, rows


def test_it_is_the_mixins_beside_the_hosts():
    trainer, arguments = zeroth_order(Seq2SeqTrainer, Seq2SeqTrainingArguments)
    assert trainer.__mro__[1] is ZeroOrderMixin and issubclass(trainer, Seq2SeqTrainer)
    assert arguments.__mro__[1] is ZeroOrderArguments and issubclass(arguments, Seq2SeqTrainingArguments)
    assert (trainer.__name__, arguments.__name__) == ("ZOSeq2SeqTrainer", "ZOSeq2SeqTrainingArguments")
    assert zeroth_order(Seq2SeqTrainer, Seq2SeqTrainingArguments) == (trainer, arguments)
    assert zeroth_order(ZOCLTrainer, ZOCLTrainingArguments) == (ZOCLTrainer, ZOCLTrainingArguments)


def test_it_trains_saves_and_goes_on(tmp_path):
    cls, arguments = zeroth_order(Trainer, TrainingArguments)

    def train(folder, steps, resume=None):
        torch.manual_seed(0)
        args = arguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            save_steps=2,
            zo_layers="all",
            zo_learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            lr_scheduler_type="constant",
        )
        trainer = cls(model=Mlp(), args=args, train_dataset=rows())
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train("whole", 4)
    assert not torch.equal(whole.model.state_dict()["layers.0.weight"], Mlp().state_dict()["layers.0.weight"])
    gone_on = train("whole", 4, str(tmp_path / "whole" / "checkpoint-2"))
    for mine, other in zip(whole.model.parameters(), gone_on.model.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.slow
def test_what_it_made_is_read_in_a_process_that_never_made_it(tmp_path):
    _, arguments = zeroth_order(Seq2SeqTrainer, Seq2SeqTrainingArguments)
    args = arguments(output_dir=str(tmp_path), zo_queries=3, use_cpu=True, report_to="none")
    (tmp_path / "args.pickle").write_bytes(pickle.dumps(args))
    read = (
        "import pickle, sys; args = pickle.load(open(sys.argv[1], 'rb')); print(type(args).__name__, args.zo_queries)"
    )
    done = subprocess.run(
        [sys.executable, "-c", read, str(tmp_path / "args.pickle")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["ZOSeq2SeqTrainingArguments", "3"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((TrainingArguments, Trainer), "trainer=<class .*TrainingArguments'>: expected a subclass of Trainer"),
        ((Trainer, {}), r"arguments=\{\}: expected a subclass of TrainingArguments"),
    ],
)
def test_other_classes_are_named(given, message):
    with pytest.raises(TypeError, match=message):
        zeroth_order(*given)


def test_a_class_that_no_other_process_would_find_is_refused():
    class Here(Trainer):
        pass

    with pytest.raises(ValueError, match=r"Here: it is defined within a function"):
        zeroth_order(Here, TrainingArguments)
