"""TRL's SFTTrainer with zeroth-order layers, in one line: a tiny Llama learns to write definitions.

Needs TRL: `pip install trl`. The model has random weights, so that nothing is downloaded.
"""

import sys
import tempfile
from pathlib import Path

from datasets import load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from hf_zocl import zeroth_order


try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    sys.exit("This example needs TRL: pip install trl")

ZOSFTTrainer, ZOSFTConfig = zeroth_order(SFTTrainer, SFTConfig)

DATA = Path(__file__).parent / "data" / "glosses"


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1000, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def main(folder: str) -> None:
    set_seed(0)
    data = load_dataset("csv", data_files=str(DATA / "train.csv"), split="train")
    tokenizer = word_tokenizer(data["text"])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    args = ZOSFTConfig(
        output_dir=f"{folder}/run",
        zo_layers="hop-even",  # blocks 2 and 4 by forward passes, the others by backpropagation
        learning_rate=2e-3,
        per_device_train_batch_size=16,
        max_steps=60,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    # A prompt and its completion, as TRL expects them.
    data = data.map(
        lambda row: {"prompt": f"{row['label']}:", "completion": f" {row['text']}"}, remove_columns=["text"]
    )
    trainer = ZOSFTTrainer(model=LlamaForCausalLM(config), args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("loss", "mean_token_accuracy", "num_tokens"):
        print(
            f"{name}: {logs[0][name]:.4g} at step {logs[0]['step']}, {logs[-1][name]:.4g} at step {logs[-1]['step']}"
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
