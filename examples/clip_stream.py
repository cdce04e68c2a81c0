"""A CLIP learns a stream of tasks: five classes of CIFAR-10, then five more; each task ends with a checkpoint.

Everything it needs is in the package: a mini CLIP and a sample of CIFAR-10.
"""

import tempfile
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor, CLIPModel, set_seed

from hf_zocl import CLIPClassifier, ContinualTaskScheduler, TaskStream, ZOCLTrainingArguments, load_task_checkpoint
from hf_zocl.sample import sample_path


def main(folder: Path) -> None:
    set_seed(0)
    base = str(sample_path("mini-clip"))  # or "openai/clip-vit-base-patch16"
    dataset = load_dataset(str(sample_path("cifar10-sample")))  # or any image dataset of the Hub
    processor = AutoProcessor.from_pretrained(base)
    stream = TaskStream.from_dataset(dataset, increment=5, max_train_images_per_class=32, max_test_images_per_class=32)
    clip = get_peft_model(CLIPModel.from_pretrained(base), LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = CLIPClassifier(clip, processor.tokenizer, stream.class_names)

    args = ZOCLTrainingArguments(
        str(folder),
        zo_branch="language",  # the text tower's odd layers by forward passes, all others by backpropagation
        zo_layers="hop-odd",
        learning_rate=1e-3,
        num_train_epochs=2,
        per_device_train_batch_size=16,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    results = ContinualTaskScheduler(model, processor, stream, args).run()
    print({name: round(results[name], 3) for name in ("avg", "last", "forgetting")})

    model, _ = load_task_checkpoint(folder / "task-02")
    names, probabilities = model.predict([dataset["test"][0]["img"]])
    print("the first test image:", names[0], f"({probabilities.max():.0%})")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder) / "run")
