"""Other libraries' Trainers with zeroth-order layers: TRL's, sentence-transformers' and Seq2Seq, hop-even and all.

Of each: what the host counts and collects is its control's at the first step, GRPO and RLOO generate as often, a
training goes on from a checkpoint to the bit, and with `zo_branch="none"` the losses are the control's.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_zocl import zeroth_order


pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
WORDS = "<pad> </s> <unk> [CLS] [SEP] a b c d e f".split()
TEXTS = ["a b c d e f", "f e d c", "b d f", "a c e b"]
# What differs from run to run, or is not the host's.
NOT_COMPARED = ("time", "runtime", "learning_rate", "grad_norm", "epoch", "per_second", "loss")


@dataclass
class Host:
    """How to make a host's Trainer: its classes, the model, the data, and further arguments of both."""

    trainer: type
    config: type
    model: Callable[[], Any]
    data: dict[str, list]
    options: dict[str, Any] = field(default_factory=dict)
    more: Callable[[Any], dict[str, Any]] = lambda model: {}
    calls: list = field(default_factory=list)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, sep_token="[SEP]", model_max_length=32, **special)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokenizer):
    """Folders of a causal LM and a reward model: some hosts load a reference model by the name of theirs."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = LlamaConfig(vocab_size=len(WORDS), **SIZES, **special, num_labels=1)
    folders = {}
    for cls in (LlamaForCausalLM, LlamaForSequenceClassification):
        folders[cls] = tmp_path_factory.mktemp(cls.__name__)
        cls(config).save_pretrained(folders[cls])
        tokenizer.save_pretrained(folders[cls])
    return lambda cls: cls.from_pretrained(folders[cls])


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    BertModel(BertConfig(vocab_size=len(WORDS), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def host(request, tokenizer, llama, bert):
    return {**TRL, **SENTENCE_TRANSFORMERS, "seq2seq": seq2seq}[request.param](tokenizer, llama, bert)


def seq2seq(tokenizer, llama, bert) -> Host:
    def model():
        torch.manual_seed(0)
        sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 4, "num_heads": 4}
        return T5ForConditionalGeneration(T5Config(vocab_size=len(WORDS), **sizes, decoder_start_token_id=0))

    ids = [[5 + i % 6, 6, 7] for i in range(32)]
    data = {"input_ids": ids, "labels": [row[::-1] for row in ids]}
    return Host(Seq2SeqTrainer, Seq2SeqTrainingArguments, model, data)


def of_trl(name: str, columns: dict[str, list], cls: type = LlamaForCausalLM, **options) -> Callable[..., Host]:
    def make(tokenizer, llama, bert) -> Host:
        trl = pytest.importorskip("trl")
        trainer, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
        data = {key: values * 8 for key, values in columns.items()}
        made = Host(trainer, config, lambda: llama(cls), data, {"bf16": False, **options})

        def reward(completions, **_):
            made.calls.append(len(completions))
            return [float(len(set(completion))) for completion in completions]

        rewards = {"reward_funcs": reward} if name in ("GRPO", "RLOO") else {}
        made.more = lambda model: {"processing_class": tokenizer, **rewards}
        return made

    return make


PAIRS = {"prompt": TEXTS, "chosen": [" a a", " b", " c c", " d"], "rejected": [" f", " e e", " d", " a a a"]}
ONLINE = {"num_generations": 2, "max_completion_length": 6, "gradient_accumulation_steps": 2, "num_iterations": 2}
TRL = {
    "sft": of_trl("SFT", {"text": TEXTS}),
    "dpo": of_trl("DPO", PAIRS),
    "kto": of_trl("KTO", {"prompt": TEXTS, "completion": PAIRS["chosen"], "label": [True, False, True, False]}),
    "reward": of_trl("Reward", PAIRS, LlamaForSequenceClassification),
    "grpo": of_trl("GRPO", {"prompt": TEXTS}, **ONLINE),
    "rloo": of_trl("RLOO", {"prompt": TEXTS}, **ONLINE),
}


def sentence_transformer(tokenizer, llama, bert) -> Host:
    """With a loss that has parameters of its own."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer import modules as parts

    def model():
        torch.manual_seed(0)
        modules = [parts.Transformer(bert), parts.Pooling(SIZES["hidden_size"])]
        return st.SentenceTransformer(modules=modules, device="cpu")

    data = {"a": TEXTS * 8, "b": TEXTS[::-1] * 8, "label": [0, 1] * 16}
    made = Host(st.SentenceTransformerTrainer, st.SentenceTransformerTrainingArguments, model, data)
    made.more = lambda model: {"loss": losses.SoftmaxLoss(model, SIZES["hidden_size"], 2)}
    return made


def cross_encoder(tokenizer, llama, bert) -> Host:
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    def model():
        torch.manual_seed(0)
        return st.CrossEncoder(bert, num_labels=1, device="cpu")

    data = {"a": TEXTS * 8, "b": TEXTS[::-1] * 8, "label": [0.0, 1.0] * 16}
    made = Host(st.CrossEncoderTrainer, st.CrossEncoderTrainingArguments, model, data)
    made.more = lambda model: {"loss": BinaryCrossEntropyLoss(model)}
    return made


SENTENCE_TRANSFORMERS = {"sentence-transformer": sentence_transformer, "cross-encoder": cross_encoder}
NAMES = [*TRL, *SENTENCE_TRANSFORMERS, "seq2seq"]


def run(host: Host, folder, classes=None, resume: str | None = None, **options) -> Any:
    trainer_class, config = classes or (host.trainer, host.config)
    host.calls.clear()
    args = config(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=2,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{**host.options, **options},
    )
    model = host.model()
    data = Dataset.from_dict(host.data)
    trainer = trainer_class(model=model, args=args, train_dataset=data, **host.more(model))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained(trainer) -> list[torch.Tensor]:
    """All that an optimizer knows, and the model."""
    groups = trainer.optimizer.param_groups
    return [*trainer.model.parameters(), *(parameter for group in groups for parameter in group["params"])]


def logged_losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@cache
def _controls() -> dict[str, tuple[list[float], dict[str, Any], int]]:
    return {}


def control(host: Host, folder) -> tuple[list[float], dict[str, Any], int]:
    """The host's own losses, its first log, and how much it generated."""
    known, name = _controls(), host.trainer.__name__
    if name not in known:
        trainer = run(host, folder, save_strategy="no")
        known[name] = logged_losses(trainer), trainer.state.log_history[0], sum(host.calls)
    return known[name]


@pytest.mark.parametrize("host", NAMES, indirect=True)
def test_without_zeroth_order_layers_it_is_the_host(tmp_path, host):
    expected, _, generated = control(host, tmp_path / "control")
    ours = run(host, tmp_path / "none", zeroth_order(host.trainer, host.config), zo_branch="none", save_strategy="no")
    assert logged_losses(ours) == expected
    assert sum(host.calls) == generated


@pytest.mark.parametrize("host", ["sft"], indirect=True)
def test_passes_that_left_a_trace_would_be_seen(tmp_path, host, monkeypatch):
    monkeypatch.setattr("hf_zocl.trainer.micro_batch.leaving_no_trace", lambda host: nullcontext())
    _, expected, _ = control(host, tmp_path / "control")
    traced = run(host, tmp_path / "zo", zeroth_order(host.trainer, host.config), save_strategy="no", zo_layers="all")
    assert traced.state.log_history[0]["num_tokens"] > expected["num_tokens"]


@pytest.mark.parametrize("layers", ["hop-even", "all"])
@pytest.mark.parametrize("host", NAMES, indirect=True)
def test_it_trains_as_its_control_counts_and_goes_on_to_the_bit(tmp_path, host, layers):
    _, expected, generated = control(host, tmp_path / "control")
    classes = zeroth_order(host.trainer, host.config)
    options = {"zo_layers": layers, "zo_learning_rate": 1e-3, "zo_optim": "sign", "zo_queries": 2}
    before = [parameter.detach().clone() for parameter in host.model().parameters()]
    whole = run(host, tmp_path / "run", classes, **options)
    assert sum(host.calls) == generated
    found = whole.state.log_history[0]
    for name, value in expected.items():
        if isinstance(value, (int, float)) and not any(part in name for part in NOT_COMPARED):
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)
    moved = [torch.equal(p, b) for p, b in zip(whole.model.parameters(), before, strict=True)]
    assert not all(moved) and (whole.split.zo if layers == "all" else whole.split.zo and whole.split.fo)

    gone_on = run(host, tmp_path / "run", classes, str(tmp_path / "run" / "checkpoint-2"), **options)
    pairs = zip(trained(whole), trained(gone_on), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)
    assert logged_losses(gone_on)[-2:] == logged_losses(whole)[-2:]
