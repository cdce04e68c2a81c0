"""Zeroth-order LoRA through an int8 base: training needs the memory of inference, here on a CPU.

Needs torchao: `pip install torchao`. There are only forward passes, so no activation is kept for a backward pass.
"""

import sys
import tempfile

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor, CLIPModel, set_seed

from hf_zocl import CLIPClassifier, ZOCLTrainer, ZOCLTrainingArguments
from hf_zocl.sample import sample_path


try:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
except ImportError:
    sys.exit("This example needs torchao: pip install torchao")

CLASSES = ("airplane", "automobile", "bird", "cat", "deer")
BASE = sample_path("mini-clip")  # or "openai/clip-vit-base-patch16"


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def main(folder: str) -> None:
    set_seed(0)
    processor = AutoProcessor.from_pretrained(BASE)

    def pixels(rows: dict) -> dict:
        return {
            "pixel_values": processor(images=rows["img"], return_tensors="pt").pixel_values,
            "labels": rows["label"],
        }

    data = load_dataset(str(sample_path("cifar10-sample"))).filter(lambda row: row["label"] < len(CLASSES))
    data = data.with_transform(pixels)
    clip = CLIPModel.from_pretrained(BASE)
    whole = megabytes(clip)
    quantize_(clip, Int8WeightOnlyConfig())  # all linear layers; other models by from_pretrained's quantization_config
    print(f"the base: {whole:.1f} MB in float32, {megabytes(clip):.1f} MB with int8 weights")
    clip = get_peft_model(clip, LoraConfig(target_modules=["q_proj", "v_proj"]))
    args = ZOCLTrainingArguments(
        output_dir=f"{folder}/run",
        zo_layers="all",
        zo_queries="vision=2,language=16",  # the text tower's passes are cheap
        per_device_train_batch_size=32,
        max_steps=60,
        logging_steps=20,
        save_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = ZOCLTrainer(
        model=CLIPClassifier(clip, processor.tokenizer, CLASSES),
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    print(
        f"accuracy on {len(data['test'])} images: {before:.1%} before, {trainer.evaluate()['eval_accuracy']:.1%} after"
    )


def megabytes(model: torch.nn.Module) -> float:
    with tempfile.TemporaryFile() as file:
        torch.save(model.state_dict(), file)
        return file.tell() / 1e6


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
