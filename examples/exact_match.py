"""A small language model learns from exact matches of what it generates: sums of two digits, right or wrong.

It learns by the usual loss first, because exact match says nothing about a model that is never right; then by forward
passes alone, from `zo_objective`. It runs offline, from random weights.
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_zocl import ZOCLTrainer, ZOCLTrainingArguments


PLUS, EQUALS, END = 10, 11, 12  # the tokens; 0 to 9 are the digits


def sums() -> list[dict]:
    """All examples `a+b=cd`; the loss is over the two digits of the sum."""
    rows = []
    for a in range(10):
        for b in range(10):
            answer = [(a + b) // 10, (a + b) % 10]
            ids = [a, PLUS, b, EQUALS, *answer]
            rows.append({"input_ids": torch.tensor(ids), "labels": torch.tensor([-100] * 4 + answer)})
    return rows


def misses(model, inputs, outputs) -> torch.Tensor:
    """1 for every sum that is not answered exactly, otherwise 0."""
    prompts = inputs["input_ids"][:, :4]
    mask = torch.ones_like(prompts)
    found = model.generate(prompts, attention_mask=mask, max_new_tokens=2, do_sample=False)
    return (found != inputs["input_ids"]).any(dim=1)


def train(model: GPT2LMHeadModel, folder: str, objective=None, **options) -> None:
    args = ZOCLTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=100,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    ZOCLTrainer(model=model, args=args, train_dataset=sums(), zo_objective=objective).train()


def exact_match(model: GPT2LMHeadModel) -> float:
    ids = torch.stack([row["input_ids"] for row in sums()])
    return 1 - misses(model.eval(), {"input_ids": ids}, None).float().mean().item()


def main(folder: str) -> None:
    set_seed(0)
    shape = {"vocab_size": 13, "n_positions": 8, "n_embd": 32, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=None, eos_token_id=END, pad_token_id=END))
    train(model, folder, zo_branch="none", learning_rate=5e-3, max_steps=60)
    by_loss = exact_match(model)
    train(
        model, folder, misses, zo_layers="all", zo_estimator="fzoo", zo_queries=8, zo_learning_rate=2e-3, max_steps=60
    )
    print(f"exact match: {by_loss:.0%} after the loss, {exact_match(model):.0%} after exact match itself")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
