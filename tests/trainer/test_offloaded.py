"""A base that accelerate has spread or offloaded trains as one in memory does, and in less of it."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_zocl import ZOCLTrainer
from hf_zocl.passes import ForwardState
from hf_zocl.passes.structure import devices_of
from tests.helpers import Mlp, arguments, rows, slow_but_for, training_logs


ROOT = Path(__file__).resolve().parents[2]
# Of the children that accelerate puts elsewhere, the layers and the head; the others stay.
SPREAD = {
    "model.embed_tokens": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
DATA = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(32)]
OPTIONS = {"zo_queries": 2, "logging_steps": 1, "per_device_train_batch_size": 4}


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, attention_dropout=0.1, use_cache=False))


def offloaded(how: str, folder: Path) -> LlamaForCausalLM:
    model, where = base(), str(folder / "offloaded")
    if how == "disk_offload":
        return disk_offload(model, where)
    if how == "cpu_offload":
        return cpu_offload(model)
    if how == "dispatch_model":
        return dispatch_model(model, SPREAD, offload_dir=where)
    if how == "memory":
        return model
    model.save_pretrained(folder / "base")
    device_map = SPREAD if how == "from_pretrained, spread" else {"": "disk"}
    return LlamaForCausalLM.from_pretrained(folder / "base", device_map=device_map, offload_folder=where)


def with_lora(model, **options):
    torch.manual_seed(1)
    random = {"init_lora_weights": False, "lora_dropout": 0.1}
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **(random | options)))


def trainer(folder: Path, model, **options) -> ZOCLTrainer:
    args = arguments(folder, **(OPTIONS | options))
    return ZOCLTrainer(model=model, args=args, train_dataset=DATA, eval_dataset=DATA[:8])


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def trained(folder: Path, how: str, **options) -> tuple[list[float], dict[str, torch.Tensor]]:
    made = trainer(folder, with_lora(offloaded(how, folder)), max_steps=3, **options)
    losses = [made.evaluate()["eval_loss"]]  # which prepares the model in another way
    made.train()
    assert how == "memory" or any(p.is_meta for p in made.model.parameters())
    return losses + [entry["loss"] for entry in training_logs(made)], adapter(made.model)


@pytest.mark.parametrize(
    ("how", "layers"),
    slow_but_for(
        [("disk_offload", "all"), ("from_pretrained, one entry", "hop-even")],
        [
            ("disk_offload", "all"),
            ("cpu_offload", "hop-even"),
            ("dispatch_model", [4]),
            ("from_pretrained, spread", "all"),
            ("from_pretrained, one entry", "hop-even"),
        ],
    ),
)
def test_it_trains_as_in_memory_to_the_last_bit(tmp_path, how, layers):
    losses, weights = trained(tmp_path / "there", how, zo_layers=layers)
    expected, in_memory = trained(tmp_path / "here", "memory", zo_layers=layers)
    assert losses == expected
    assert all(torch.equal(weights[name], in_memory[name]) for name in in_memory)


def test_a_training_goes_on_from_a_checkpoint(tmp_path):
    def make():
        model = with_lora(offloaded("from_pretrained, spread", tmp_path))
        return trainer(tmp_path, model, max_steps=4, save_steps=2, save_strategy="steps", zo_layers="hop-even")

    whole, again = make(), make()
    whole.train()
    again.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert again.state.global_step == 4
    assert all(torch.equal(mine, adapter(whole.model)[name]) for name, mine in adapter(again.model).items())


def test_layers_below_the_perturbed_ones_are_read_once_a_step(tmp_path, monkeypatch):
    made = trainer(
        tmp_path, with_lora(offloaded("disk_offload", tmp_path)), max_steps=3, zo_layers=[4], zo_branch="dual"
    )
    for name, parameter in made.model.named_parameters():
        parameter.requires_grad_("lora_" in name and "layers.3" in name)
    made._assign_layers()
    reads = []
    hook = made.model.get_base_model().model.layers[0].mlp.up_proj._hf_hook
    monkeypatch.setattr(
        hook, "pre_forward", lambda *args, read=hook.pre_forward, **kw: (reads.append(1), read(*args, **kw))[1]
    )
    counts = []
    step = made.training_step
    monkeypatch.setattr(made, "training_step", lambda *args: (step(*args), counts.append(len(reads)))[0])
    made.train()
    assert [later - earlier for earlier, later in pairwise(counts)] == [1, 1]


@pytest.mark.parametrize("layers", ["all", [1]])
def test_what_is_trained_and_offloaded_is_refused_in_one_line(tmp_path, layers):
    with pytest.raises(
        ValueError, match=r"^\d+ parameters to be trained are offloaded .* such as .*: expected all in"
    ):
        trainer(tmp_path, disk_offload(with_lora(base()), str(tmp_path / "offloaded")), zo_layers=layers)


def test_an_initialisation_that_reads_the_bases_weights_has_them(tmp_path):
    there = with_lora(offloaded("disk_offload", tmp_path), use_dora=True)
    here = with_lora(base(), use_dora=True)
    assert all(torch.equal(adapter(there)[name], value) for name, value in adapter(here).items())
    assert any("magnitude" in name for name in adapter(here))


def test_an_initialisation_that_changes_them_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LoraConfig: its initialisation changes the base's weights"):
        with_lora(offloaded("disk_offload", tmp_path), init_lora_weights="pissa")


def test_a_model_spread_over_several_accelerators_is_taken(tmp_path):
    model = Mlp()
    model.hf_device_map = {"a": 0, "b": 1}
    made = ZOCLTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=rows())
    assert made.is_model_parallel
    made.train()
    assert made.state.global_step == 1


def test_the_random_states_of_all_devices_are_kept(monkeypatch):
    devices = [torch.device("cuda", number) for number in (0, 1)]
    states = {device: torch.tensor([number]) for number, device in enumerate(devices)}
    module = SimpleNamespace(
        get_rng_state=lambda device: states[device].clone(),
        set_rng_state=lambda state, device: states.__setitem__(device, state),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    before = ForwardState([torch.device("cpu"), *devices])
    states[devices[1]] = torch.tensor([7])
    assert not before.same_random_state(before.now())
    before.restore()
    assert states[devices[1]].tolist() == [1]
    assert before.same_random_state(before.now())


def test_the_devices_of_a_model_are_also_those_that_offloaded_layers_run_on():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    model[1]._hf_hook = SimpleNamespace(execution_device="cuda:1", offload=True)
    assert [device.type for device in devices_of(model)] == ["cpu", "cuda"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited as Linux does")
def test_a_base_of_twice_the_allowed_memory_trains_offloaded_to_disk(tmp_path):
    small = ["--batch", "1", "--length", "16"]
    benchmark = str(ROOT / "scripts" / "benchmarks" / "large_base.py")

    def run(way: str, *more: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            benchmark,
            "--limited",
            way,
            "--folder",
            str(tmp_path),
            "--megabytes",
            "256",
            *small,
            *more,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    there, here, too_large = run("disk"), run("memory", "--allowed", "4096"), run("memory")
    assert there.returncode == 0, there.stderr[-2000:]
    losses = re.search(r"losses (.*)", there.stdout)[1]
    assert losses == re.search(r"losses (.*)", here.stdout)[1]
    assert too_large.returncode != 0 and re.search("memory", too_large.stderr.lower())
