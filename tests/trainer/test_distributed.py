"""Several processes train as one does, and send each other what the theory says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import CLIPModel

from hf_zocl import ZOCLTrainingArguments
from hf_zocl.commands.recipe import build_scheduler, parse_recipe
from tests import distributed_worker as worker


ROOT = worker.ROOT
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def launch(processes: int, *arguments: str | Path, module: str = "tests.distributed_worker") -> dict:
    """Start processes; the last of their arguments is the folder that they write to."""
    command = [*TORCHRUN, "--nproc_per_node", str(processes), "--module", module, *map(str, arguments)]
    folder = Path(arguments[-1])
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def pair(folder) -> dict:
    """What two processes found; they run all quick cases in one go."""
    return launch(2, "quick", folder)


def assert_same_training(one: dict, several: dict) -> None:
    assert one["moved"] > 5e-4
    assert several["spread"] == 0
    np.testing.assert_allclose(several["losses"], one["losses"], rtol=1e-5)
    assert (several["adapter"] - one["adapter"]).norm() <= 1e-5 * one["adapter"].norm()


@pytest.mark.slow
def test_two_processes_align_as_one(tmp_path):
    one, two = worker.run_aligned_stream(tmp_path / "one"), launch(2, "aligned", tmp_path)["stream"]
    assert two["accuracy_matrix"] == one["accuracy_matrix"]
    assert two["spread"] == 0
    assert (two["adapter"] - one["adapter"]).norm() <= 1e-4 * one["adapter"].norm()


@pytest.mark.parametrize("case", worker.QUICK)
@pytest.mark.slow
def test_two_processes_train_as_one_with_the_batch_of_both(pair, case):
    assert_same_training(worker.run_cases([case], worker.QUICK_STEPS)[case], pair["cases"][case])


@pytest.mark.slow
def test_two_processes_train_as_one_over_50_steps(tmp_path):
    found = launch(2, "grid", tmp_path)["cases"]
    for case, one in worker.run_cases(worker.GRID, steps=50).items():
        assert_same_training(one, found[case])


@pytest.mark.slow
def test_first_order_training_sends_its_gradients_and_nothing_else(pair):
    sent = pair["payloads"]["none"]
    assert bytes_of(sent) == sent["fo_bytes"]


@pytest.mark.slow
def test_hybrid_training_sends_the_first_order_gradients_and_a_few_numbers(pair):
    sent = pair["payloads"]["hybrid"]
    assert 0 < sent["fo_bytes"] < pair["payloads"]["none"]["fo_bytes"]
    assert bytes_of(sent) == sent["fo_bytes"] + 4 * (1 + 4)  # L(θ), and the loss of each of 4 queries


@pytest.mark.parametrize(("case", "queries"), [("all-zo", 1), ("all-zo, rank 32", 1), ("all-zo, 8 queries", 8)])
@pytest.mark.slow
def test_all_zeroth_order_training_sends_its_losses_alone_whatever_the_adapters_size(pair, case, queries):
    sent = pair["payloads"][case]
    assert sent["fo_bytes"] == 0
    assert bytes_of(sent) == 4 * (1 + 2 * queries)  # L(θ), and a loss per query of each of two branches
    assert len(sent["sent"]["all_reduce"]) == 1
    assert bytes_of(sent) <= 64 * queries


@pytest.mark.parametrize("case", ["all-zo, two-sided", "all-zo, conservative"])
@pytest.mark.slow
def test_other_estimators_send_little_too(pair, case):
    assert bytes_of(pair["payloads"][case]) <= 64 * 2


def bytes_of(payload: dict) -> int:
    """Of one step; that the Trainer gathers the loss to log it is not a part of training."""
    return sum(sum(sizes) for name, sizes in payload["sent"].items() if name != "all_gather")


@pytest.mark.slow
def test_the_cost_model_reckons_with_the_bytes_that_are_measured(pair, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
    from scaling import Job, Link

    found = pair["payloads"]
    adapter, first_order = (found[name]["fo_bytes"] // 4 for name in ("none", "hybrid"))
    job = Job("mini CLIP", adapter, adapter - first_order, queries=4)
    assert sum(job.messages("FO-DDP")) == bytes_of(found["none"])
    assert sum(job.messages("hybrid")) == bytes_of(found["hybrid"])
    assert job.messages("all-ZO") == [4 * 5]
    assert Link("slow", 1e6, 0.5).all_reduce(4_000_000, ranks=4) == 2 * 2 * 0.5 + 2 * 0.75 * 4


@pytest.mark.slow
def test_all_passes_of_a_step_begin_with_the_buffers_of_the_first_process(tmp_path):
    found = launch(2, "buffers", tmp_path)["buffers"]
    assert found["[1]"]["differences"] == [0.0] * 4  # these weights change nothing; another buffer would
    for each in found.values():
        assert each["resumed"] == each["whole"]


@pytest.mark.slow
def test_processes_freeze_the_same_experts(pair):
    assert pair["frozen"] == [[0, 1, 0]] * 2


def assert_same_predictions(found: dict) -> None:
    """Every example once, in order, as one process predicts it."""
    for size, one in worker.predict().items():
        np.testing.assert_array_equal(found[size]["labels"], one["labels"])
        np.testing.assert_allclose(found[size]["logits"], one["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_predict_every_example_once(pair):
    assert_same_predictions(pair["predictions"])


@pytest.mark.slow
def test_three_processes_predict_every_example_once(tmp_path):
    assert_same_predictions(launch(3, "predictions", tmp_path)["predictions"])


@pytest.mark.slow
def test_a_stream_of_tasks_has_the_same_results_and_one_writer(pair, folder, tmp_path):
    one, two = worker.run_stream(tmp_path), pair["stream"]
    for name in ("zero_shot", "accuracy_matrix", "seen_accuracy", "last", "avg", "forgetting"):
        assert two[name] == one[name]
    for mine, theirs in zip(two["details"], one["details"], strict=True):
        assert mine["per_class_accuracy"] == theirs["per_class_accuracy"]
    assert json.loads((folder / "run-of-rank-0" / "results.json").read_text())["last"] == one["last"]
    assert sorted(path.name for path in folder.iterdir()) == ["results.pt", "run-of-rank-0"]


@pytest.mark.parametrize("name", ["cpu_2", "one_gpu", "one_node_8_gpus", "several_nodes"])
def test_launch_configurations_are_accelerates_own(name):
    config = load_config_from_file(str(ROOT / f"scripts/launch/{name}.yaml"))
    assert config.num_processes == {"cpu_2": 2, "one_gpu": 1, "one_node_8_gpus": 8, "several_nodes": 32}[name]
    assert (config.distributed_type == DistributedType.MULTI_GPU) == (config.num_processes > 1)


def launch_quickstart(folder: Path, *launcher: str, arguments: Sequence[str]) -> str:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *launcher]
    recipe = ["--recipe", "scripts/recipes/quickstart.yaml", "--output_dir", str(folder), "--use_cpu", "true"]
    env = environment()
    del env["ACCELERATE_USE_CPU"]
    done = subprocess.run(
        [*command, "scripts/train.py", *recipe, *arguments],
        **{"env": env, "cwd": ROOT, "capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TWO_PROCESSES = ("--config_file", "scripts/launch/cpu_2.yaml")


@pytest.mark.slow
def test_the_configuration_for_two_cpu_processes_starts_a_pair(tmp_path):
    small = ["--initial_increment", "10", "--max_steps", "2", "--max_test_images_per_class", "3"]
    assert launch_quickstart(tmp_path, *TWO_PROCESSES, arguments=small).count("Written to") == 1


@pytest.mark.slow
def test_the_quickstart_has_the_same_accuracies_in_two_processes(tmp_path):
    """In float64: in float32, signs make whole steps of rounding errors (docs/scaling.md)."""
    one, two = tmp_path / "one", tmp_path / "two"
    exact = ["--dtype", "float64", "--max_train_images_per_class", "100", "--increment", "5"]
    exact += ["--classifier_alignment", "0"]  # which draws its features in float32
    launch_quickstart(one, "--num_processes", "1", arguments=[*exact, "--per_device_train_batch_size", "32"])
    launch_quickstart(two, *TWO_PROCESSES, arguments=[*exact, "--per_device_train_batch_size", "16"])
    mine, theirs = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
    assert mine["accuracy_matrix"] == theirs["accuracy_matrix"]
    for task in (1, 2):
        adapters = [load_file(folder / f"task-{task:02d}" / "adapter_model.safetensors") for folder in (one, two)]
        for name, value in adapters[0].items():
            torch.testing.assert_close(value, adapters[1][name], rtol=1e-10, atol=1e-12)


def test_the_slurm_script_starts_torchrun_on_every_node_and_resumes_when_requeued(tmp_path):
    for name, body in {"scontrol": "echo node-7; echo node-8", "srun": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "5", "SLURM_CPUS_PER_TASK": "16"}
    env = environment(
        **slurm, SLURM_GPUS_ON_NODE="4", SLURM_RESTART_COUNT="1", PATH=f"{tmp_path}:{os.environ['PATH']}"
    )
    script = ["bash", "scripts/launch/slurm.sh", "--recipe", "a recipe.yaml"]
    done = subprocess.run(script, env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("torchrun --nnodes 2 --nproc_per_node 4 --rdzv_id 5 --rdzv_backend c10d")
    assert "--rdzv_endpoint node-7:29500" in done.stdout
    assert done.stdout.endswith("scripts/train.py --bf16 true --recipe a recipe.yaml --resume true\n")


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config"),
    ],
)
def test_sharded_models_are_refused_before_anything_is_loaded(tmp_path, monkeypatch, variable, name):
    plain = parse_recipe(["--output_dir", str(tmp_path / "run"), "--zo_branch", "none"])
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"{name} cannot train zeroth-order layers .*Use data parallelism"):
        parse_recipe(["--output_dir", str(tmp_path / "run")])
    monkeypatch.setattr(CLIPModel, "from_pretrained", None)
    with pytest.raises(ValueError, match=f"{name} shards the model"):
        build_scheduler(plain)
    assert not (tmp_path / "run").exists()


def test_an_argument_that_shards_the_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="FSDP cannot train zeroth-order layers"):
        ZOCLTrainingArguments(str(tmp_path), fsdp=True)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the processes would find an accelerator")
def test_processes_that_do_not_know_of_one_another_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="2 processes were started, but .* would train 2 separate models.* pass --use_cpu"
    ):
        ZOCLTrainingArguments(str(tmp_path))


@pytest.mark.slow
def test_a_run_goes_on_when_a_process_is_killed(tmp_path):
    """torchrun starts both processes anew, and the run ends as if nothing had happened."""
    sizes = ["--initial_increment", "5", "--increment", "5", "--max_steps", "30", "--max_test_images_per_class", "20"]
    sizes += ["--per_device_train_batch_size", "8", "--zo_queries", "vision=1,language=2"]
    script = ["scripts/train.py", "--recipe", "scripts/recipes/quickstart.yaml", "--use_cpu", "true", *sizes]
    elastic = [*TORCHRUN, "--nproc_per_node", "2", "--max_restarts", "1", *script]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with (tmp_path / "log").open("w") as log:
        options = {"env": environment(), "cwd": ROOT, "stdout": log, "stderr": log}
        subprocess.run([*elastic, "--output_dir", str(whole)], check=True, **options)
        process = subprocess.Popen([*elastic, "--output_dir", str(killed)], **options)
        wait_for(killed / "results.json", process)
        os.kill(process_of_rank(1, process.pid), signal.SIGKILL)
        assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-5000:]
    one, two = (json.loads((run / "results.json").read_text()) for run in (whole, killed))
    for name in ("accuracy_matrix", "seen_accuracy", "last", "avg", "forgetting"):
        assert two[name] == one[name]
    assert "from the beginning" not in (tmp_path / "log").read_text()


def wait_for(file: Path, process: subprocess.Popen) -> None:
    while not file.is_file():
        assert process.poll() is None
        time.sleep(0.05)


def process_of_rank(rank: int, parent: int) -> int:
    children = psutil.Process(parent).children()
    return next(child.pid for child in children if child.environ().get("RANK") == str(rank))


@pytest.mark.slow
def test_a_frozen_base_in_shards_trains_as_a_whole_one(tmp_path):
    found = launch(2, tmp_path, module="tests.sharded_worker")
    for layers in ("all", "hop-even"):
        sharded, whole = found[layers, True], found[layers, False]
        assert sharded["losses"] == whole["losses"]
        assert all(torch.equal(value, sharded["adapter"][name]) for name, value in whole["adapter"].items())
    assert all(torch.equal(value, found["resumed"][name]) for name, value in whole["adapter"].items())
    assert re.match(r"\d+ parameters to be trained are shards, such as .*: expected them whole", found["refused"])
