"""What two processes run whose frozen base is sharded, or not.

    torchrun --nproc_per_node 2 --module tests.sharded_worker FOLDER

leaves what rank 0 found in FOLDER/results.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from hf_zocl import ZOCLTrainer
from hf_zocl.trainer.data_parallel import leave_process_group
from tests.helpers import arguments, training_logs


DATA = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(32)]


def model(is_sharded: bool, leaves_out: bool = True):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, use_cache=False))
    made = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    if is_sharded:
        own = {parameter for parameter in made.parameters() if parameter.requires_grad and leaves_out}
        for module in (*base.model.layers, made):
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)), ignored_params=own)
    return made


def trainer(folder: Path, *, is_sharded: bool, leaves_out: bool = True, **options) -> ZOCLTrainer:
    args = arguments(folder, use_cpu=True, zo_queries=2, zo_eps=1e-2, max_steps=3, **options)
    return ZOCLTrainer(model=model(is_sharded, leaves_out), args=args, train_dataset=DATA)


def found(made: ZOCLTrainer) -> dict:
    made.train()
    adapter = {name: p.detach().clone() for name, p in made.model.named_parameters() if "lora_" in name}
    return {"losses": [entry["loss"] for entry in training_logs(made)], "adapter": adapter}


def main(folder: Path) -> None:
    results = {}
    arguments(folder, use_cpu=True)  # which begins the group of processes
    for layers in ("all", "hop-even"):
        for is_sharded in (True, False):
            made = trainer(folder / f"{layers}-{is_sharded}", is_sharded=is_sharded, zo_layers=layers)
            results[layers, is_sharded] = found(made)
    saves = {"is_sharded": True, "zo_layers": "hop-even", "save_strategy": "steps", "save_steps": 2}
    trainer(folder / "saves", **saves).train()
    again = trainer(folder / "saves", **saves)
    again.train(resume_from_checkpoint=str(Path(again.args.output_dir) / "checkpoint-2"))
    results["resumed"] = {name: p.detach() for name, p in again.model.named_parameters() if "lora_" in name}
    try:
        trainer(folder / "refused", is_sharded=True, leaves_out=False)
    except ValueError as error:
        results["refused"] = str(error)
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    leave_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
