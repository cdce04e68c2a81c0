"""Whole runs, in processes of their own, pushed to a Hub and loaded from it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_zocl.sample import sample_path

from .hub_server import HubServer


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
REPO = "tester/run"
TASKS = [f"task-0{number}" for number in range(1, 6)]
# Five tasks of two classes, over all test images of the sample, so that whoever loads a task needs no choice of them.
QUICK = "--max_steps 2 --warmup_steps 0 --learning_rate 0.01 --zo_learning_rate 0.01 --max_train_images_per_class 8"
QUICK += " --increment 2 --zo_queries 1 --disable_tqdm true --save_strategy steps --save_steps 1"
LOAD = """
import json, sys
import torch
from datasets import load_dataset
from huggingface_hub import hf_hub_download
from transformers import CLIPModel, CLIPProcessor, pipeline

repo, data, *revisions = sys.argv[1:]
test = load_dataset(data, split="test")
accuracies = {}
for revision in revisions:
    model = CLIPModel.from_pretrained(repo, revision=revision).eval()
    processor = CLIPProcessor.from_pretrained(repo, revision=revision)
    task = json.load(open(hf_hub_download(repo, "task.json", revision=revision)))
    seen = test.filter(lambda row: row["label"] in task["class_order"])
    prompts = [task["prompt_template"].format(name) for name in task["classes"]]
    inputs = processor(text=prompts, images=list(seen["img"]), return_tensors="pt", padding=True)
    with torch.no_grad():
        predicted = model(**inputs).logits_per_image.argmax(dim=-1)
    labels = torch.tensor([task["class_order"].index(label) for label in seen["label"]])
    accuracies[revision] = (predicted == labels).float().mean().item()
pipe = pipeline("zero-shot-image-classification", model=repo, revision=revisions[-1])
answers = pipe(seen[0]["img"], candidate_labels=task["classes"], hypothesis_template=task["prompt_template"])
assert answers[0]["label"] == task["classes"][predicted[0]]
assert "hf_zocl" not in sys.modules
print(json.dumps(accuracies))
"""
LOAD_BY_TASK = """
import json, sys
from hf_zocl.continual.checkpoint_evaluation import evaluate_checkpoint

print(json.dumps({n: evaluate_checkpoint(sys.argv[1], task=int(n))["seen_accuracy"] for n in sys.argv[2:]}))
"""


def environment(hub: HubServer, cache: Path) -> dict[str, str]:
    return {**os.environ, **hub.environment(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def train(output_dir: Path, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    recipe = ["--recipe", "scripts/recipes/quickstart.yaml", "--output_dir", str(output_dir), *QUICK.split()]
    command = [sys.executable, "scripts/train.py", *recipe, "--push_to_hub", "true", "--hub_model_id", "run"]
    return subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def fresh_process(script: str, env: dict[str, str], *arguments: str) -> dict:
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def results_of(hub: HubServer, revision: str) -> dict:
    return json.loads(hub.repository(REPO).path(revision, "results.json").read_text())


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A Hub, the folder of a run that was pushed to it through some faults, and what the run said."""
    folder = tmp_path_factory.mktemp("pushed")
    with HubServer(folder / "hub") as hub:
        hub.order("status", "POST .*/commit/", status=503)
        hub.order("drop", "POST .*/tag/")
        env = environment(hub, folder / "cache")
        del env["HF_TOKEN"]
        done = train(folder / "output", env, "--hub_token", hub.token)
        assert done.returncode == 0, done.stderr
        yield hub, folder, done.stdout + done.stderr


def test_five_tasks_are_five_commits_and_five_tags(pushed):
    hub, folder, output = pushed
    commits = hub.repository(REPO).history()[::-1]
    assert [commit["title"] for commit in commits[1:]] == [f"Task {number} of 5" for number in range(1, 6)]
    assert hub.repository(REPO).tags == {name: commit["id"] for name, commit in zip(TASKS, commits[1:], strict=True)}
    assert "Pushing failed" in output
    assert f"All tasks are on the Hub: {hub.url}/{REPO}" in output
    assert not (folder / "output" / "push_queue.json").exists()


def test_every_revision_holds_the_results_so_far(pushed):
    hub, folder, _ = pushed
    final = json.loads((folder / "output" / "results.json").read_text())
    for number, name in enumerate(TASKS, start=1):
        results = results_of(hub, name)
        assert results["accuracy_matrix"] == final["accuracy_matrix"][:number]
        assert results["last"] == final["seen_accuracy"][number - 1]
    assert len({row[-1] for row in final["accuracy_matrix"]}) > 1


def test_revisions_load_in_a_fresh_process_without_hf_zocl(pushed, tmp_path):
    hub, _, _ = pushed
    measured = fresh_process(LOAD, environment(hub, tmp_path), REPO, str(sample_path("cifar10-sample")), *TASKS)
    for name in TASKS:
        assert measured[name] == pytest.approx(results_of(hub, name)["seen_accuracy"][-1])


def test_the_last_card_parses(pushed):
    hub, _, _ = pushed
    card = ModelCard.load(hub.repository(REPO).path("main", "README.md"))
    values = {result.metric_name.split()[0]: result.metric_value for result in card.data.eval_results}
    results = results_of(hub, "main")
    assert (values["Last"], values["Avg"]) == (results["last"], results["avg"])
    assert f'"{REPO}", revision="task-05"' in card.text


def test_no_token_and_no_local_path_is_anywhere(pushed):
    hub, folder, output = pushed
    assert hub.token not in output
    for path in folder.rglob("*"):
        if path.is_file():
            assert hub.token.encode() not in path.read_bytes(), path
    secrets = [str(folder), str(ROOT), str(Path.home()) + "/"]
    for path in hub.repository(REPO).path("main").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [text for text in secrets if text.encode() in content], path


def test_a_hub_that_refuses_everything_stops_no_run(pushed, tmp_path):
    """And what is left is pushed by scripts/push.py."""
    with HubServer(tmp_path / "hub") as hub:
        hub.create(REPO)
        refusal = hub.order("status", "(POST|PUT) .*/(preupload|commit|tag)/", times=10**6, status=403)
        done = train(tmp_path / "run", environment(hub, tmp_path / "cache"), "--increment", "5", "--max_steps", "1")
        assert done.returncode == 0, done.stderr
        assert f"`python -m hf_zocl push {tmp_path / 'run'}`" in done.stderr
        assert "Not on the Hub yet: task-01, task-02" in done.stderr
        assert {"task-01", "task-02", "results.json", "push_queue.json"} <= set(os.listdir(tmp_path / "run"))
        env = environment(hub, tmp_path / "cache")
        push = [sys.executable, "scripts/push.py", str(tmp_path / "run")]
        refused = subprocess.run(push, cwd=ROOT, env=env, capture_output=True, text=True)
        assert refused.returncode == 1
        assert re.search(r"task-01 +.*403.*\ntask-02 +waits", refused.stdout)
        refusal.times = 0
        done = subprocess.run(push, cwd=ROOT, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stdout.split()[:4]) == (0, ["task-01", "pushed", "task-02", "pushed"])
        assert list(hub.repository(REPO).tags) == ["task-01", "task-02"]


def test_a_wrong_token_is_said_before_training(pushed, tmp_path):
    hub, _, _ = pushed
    wrong = "hf_wrongWrongWrongWrongWrongWrong"
    done = train(tmp_path / "run", environment(hub, tmp_path / "cache"), "--hub_token", wrong)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: push_to_hub=True, hub_model_id='run': ")
    assert wrong not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", TASKS)
def test_each_revision_loads_in_a_process_of_its_own(pushed, tmp_path, name):
    hub, _, _ = pushed
    expected = pytest.approx(results_of(hub, name)["seen_accuracy"][-1])
    env = environment(hub, tmp_path)
    assert fresh_process(LOAD, env, REPO, str(sample_path("cifar10-sample")), name) == {name: expected}
    number = str(int(name[-2:]))
    assert fresh_process(LOAD_BY_TASK, env, REPO, number) == {number: expected}


def test_a_run_of_a_mixture_of_experts_loads_with_its_accuracies(tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        env = environment(hub, tmp_path / "cache")
        moe = ["--adapter", "moe", "--adapter_config", '{"freeze_experts": 1}', "--moe_router_per_task", "true"]
        moe += ["--increment", "5"]
        done = train(tmp_path / "run", env, *moe)
        assert done.returncode == 0, done.stderr
        assert list(hub.repository(REPO).tags) == TASKS[:2]
        expected = {str(task): results_of(hub, f"task-0{task}")["seen_accuracy"][-1] for task in (1, 2)}
        assert fresh_process(LOAD_BY_TASK, env, REPO, "1", "2") == pytest.approx(expected)


def test_runs_that_are_killed_leave_whole_repositories(tmp_path):
    with HubServer(tmp_path / "hub") as hub:
        command = [
            sys.executable,
            "scripts/benchmarks/chaos.py",
            "--runs",
            "3",
            "--output_dir",
            str(tmp_path / "chaos"),
        ]
        command += ["--push_to_hub", "true", "--hub_model_id", "tester/chaos-{run}"]
        env = environment(hub, tmp_path / "cache")
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "On the Hub, 3 have task-01 and task-02" in done.stdout


def test_a_run_goes_on_from_the_hub_on_another_machine(pushed, tmp_path):
    original, folder, _ = pushed
    shutil.copytree(original.folder, tmp_path / "hub")
    with HubServer(tmp_path / "hub") as hub:
        repository = hub.repository(REPO)
        for name in TASKS[3:]:  # as if it had been stopped in the fourth task
            del repository.tags[name]
        repository.branches["main"] = repository.tags["task-03"]
        repository.write()
        done = train(tmp_path / "elsewhere", environment(hub, tmp_path / "cache"), "--resume", "true")
        assert done.returncode == 0, done.stderr
        assert "Fetched from tester/run: task-01, task-02, task-03" in done.stderr
        undisturbed = json.loads((folder / "output" / "results.json").read_text())
        resumed = json.loads((tmp_path / "elsewhere" / "results.json").read_text())
        assert resumed["accuracy_matrix"] == undisturbed["accuracy_matrix"]
        assert list(hub.repository(REPO).tags) == TASKS
        assert len(hub.repository(REPO).history()) == 6


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_strategies(tmp_path, strategy):
    with HubServer(tmp_path / "hub") as hub:
        env = environment(hub, tmp_path / "cache")
        extra = ["--increment", "5", "--hub_strategy", strategy, "--hub_always_push", "true"]
        done = train(tmp_path / "run", env, *extra)
        assert done.returncode == 0, done.stderr
        repository = hub.repository(REPO)
        titles = [commit["title"] for commit in repository.history()][::-1][1:]
        tasks = [title for title in titles if "step" not in title]
        if strategy == "end":
            assert (titles, list(repository.tags)) == (["Task 2 of 2"], ["task-02"])
            return
        assert tasks == ["Task 1 of 2", "Task 2 of 2"]
        saved = [commit for commit in repository.history() if commit["title"] == "Task 2, step 1"]
        assert len(saved) == 1
        extra = {name for name in saved[0]["files"] if "/" in name}
        kept = {name for name in repository.files("main") if name.startswith("checkpoints/")}
        if strategy == "every_save":
            assert not extra
        elif strategy == "checkpoint":
            assert extra and all(name.startswith("last-checkpoint/") for name in extra)
            assert not kept
        else:
            assert {"/".join(name.split("/")[:3]) for name in kept} == {
                f"checkpoints/task-0{task}/checkpoint-{step}" for task in (1, 2) for step in (1, 2)
            }
        assert not [name for name in extra if "training_args" in name]
        assert not list((tmp_path / "run").rglob(".push-*"))
