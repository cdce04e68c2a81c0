"""Task checkpoints on the Hub: what is pushed, what a fault does to it, and that it loads anywhere."""

import json
import logging
import re
import runpy
import shutil
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import httpx2 as httpx
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoProcessor, CLIPModel
from transformers.trainer_utils import HubStrategy

from hf_zocl import ZOCLTrainingArguments, load_task_checkpoint
from hf_zocl.commands.recipe import Recipe
from hf_zocl.continual.run_arguments import RunArguments
from hf_zocl.continual.run_folder import RunFolder
from hf_zocl.files import read_json
from hf_zocl.hub import repository as repository_module
from hf_zocl.hub.checkpoint import find_task_checkpoint, save_task_checkpoint, seal_task_checkpoint
from hf_zocl.hub.client import asked_wait
from hf_zocl.hub.public import public_files, public_recipe, redact
from hf_zocl.hub.push import QUEUE_FILE, HubPusher, PushQueue
from hf_zocl.hub.repository import fetch_run
from hf_zocl.hub.task_info import is_task_name
from hf_zocl.models import AdapterArguments
from hf_zocl.sample import sample_path
from hf_zocl.trainer.arguments import HUB_STRATEGIES

from ..helpers import mini_clip_classifier
from .checkpoints import save_checkpoint
from .conftest import use_hub
from .hub_server import HubServer


REPO = "tester/run"
ROOT = Path(__file__).parents[2]
TASKS = ("task-01", "task-02", "task-03")


def task_info(number: int, folder: Path) -> dict:
    matrix = [[0.5] * row for row in range(1, number + 1)]
    seen = [0.5] * number
    return {
        "task": number,
        "num_tasks": 3,
        "benchmark": "cifar10-sample",
        "scenario": "class",
        "dataset": None,
        "base_model": "mini-clip",
        "base_model_is_local": True,
        "adapter": "lora",
        "classes": ["cat", "dog", "ship"][:number],
        "task_classes": [["cat"], ["dog"], ["ship"]][number - 1],
        "task_sizes": [1] * number,
        "task_titles": [None] * number,
        "class_order": [3, 5, 8][:number],
        "prompt_template": "a photo of a {}.",
        "assignment": {"branch": "none", "layers": "all", "towers": {"vision": {"1": "fo"}, "language": {"1": "fo"}}},
        "metrics": {
            "accuracy_matrix": matrix,
            "seen_accuracy": seen,
            "last": 0.5,
            "avg": 0.5,
            "forgetting": 0.0,
            "backward_transfer": 0.0,
        },
        "zero_shot": {"per_task": [0.4] * 3, "seen_accuracy": [0.4] * 3, "avg": 0.4, "last": 0.4},
        "recipe": {"output_dir": str(folder), "model_name_or_path": "mini-clip", "hub_model_id": "run"},
        "seed": 0,
        "seconds": 1.0,
        "peak_memory_bytes": 10**9,
        "versions": {"hf_zocl": "0.1.0"},
    }


@pytest.fixture(scope="module")
def three_tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    model, processor = mini_clip_classifier(), AutoProcessor.from_pretrained(sample_path("mini-clip"))
    for number in (1, 2, 3):
        weight = model.clip.base_model.model.visual_projection.weight
        next(p for p in model.clip.parameters() if p.requires_grad).data.add_(number * 0.1 * weight.abs().mean())
        info = task_info(number, folder)
        results = {
            "benchmark": info["benchmark"],
            "recipe": info["recipe"],
            "tasks": ["task-01", "task-02", "task-03"],
        }
        results |= {**info["metrics"], "zero_shot": info["zero_shot"], "classes": ["cat", "dog", "ship"]}
        save_task_checkpoint(folder, model, processor, info, results)
    (folder / "results.json").write_bytes((folder / "task-03" / "results.json").read_bytes())
    return folder


@pytest.fixture
def run(three_tasks, tmp_path) -> Path:
    shutil.copytree(three_tasks, tmp_path / "run")
    return tmp_path / "run"


def edit(file: Path, **changes) -> None:
    """Change a checkpoint's file and seal it again."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    seal_task_checkpoint(file.parent)


def pusher_of(run: Path, **options) -> HubPusher:
    return HubPusher(run, **{"repo_id": "run", "waits": (0.01,) * 3, **options})


def push_all(run: Path, **options) -> list[str]:
    """As a run does it: task by task, then the end."""
    pusher = pusher_of(run, **options)
    pusher.check()
    for number in (1, 2, 3):
        pusher.push(number)
    return pusher.finish()


def titles(hub: HubServer) -> list[str]:
    return [commit["title"] for commit in hub.repository(REPO).history()][::-1]


def is_complete(hub: HubServer) -> bool:
    repository = hub.repository(REPO)
    commits = [commit["id"] for commit in repository.history()][::-1][1:]
    return titles(hub)[1:] == [f"Task {n} of 3" for n in (1, 2, 3)] and repository.tags == dict(
        zip(TASKS, commits, strict=True)
    )


def test_each_task_is_a_commit_and_a_tag(client, hub, run):
    assert push_all(run) == []
    assert is_complete(hub)
    assert titles(hub)[0] == "initial commit"  # the Hub's own, with .gitattributes
    assert not (run / QUEUE_FILE).exists()


def test_a_revision_holds_the_tasks_checkpoint_and_nothing_else(client, hub, run):
    (run / "task-01" / "chat_template_of_task_one.jinja").write_text("{}")
    seal_task_checkpoint(run / "task-01")
    (run / "task-01" / "notes_of_the_user.json").write_text("{}")
    push_all(run)
    (run / "task-01" / "notes_of_the_user.json").unlink()
    for name in TASKS:
        there = set(hub.repository(REPO).files(name)) - {".gitattributes"}
        here = {path.relative_to(run / name).as_posix() for path in (run / name).rglob("*") if path.is_file()}
        assert there == here | {"config.json", "model.safetensors"}
        assert {"README.md", "task.json", "results.json", "accuracy_matrix.png", "adapter_model.safetensors"} <= there
        weights = hub.repository(REPO).path(name, "adapter_model.safetensors").read_bytes()
        assert weights == (run / name / "adapter_model.safetensors").read_bytes()
    assert len({path for method, path, _ in hub.requests if method == "PUT"}) == 4  # the base model once


def test_pushing_twice_changes_nothing(client, hub, run):
    push_all(run)
    before = (titles(hub), hub.repository(REPO).tags)
    pusher = pusher_of(run)
    pusher.queue.pending = list(TASKS)
    assert pusher.drain() == dict.fromkeys(TASKS, "unchanged")
    assert (titles(hub), hub.repository(REPO).tags) == before


def test_a_run_that_replaces_another_moves_its_tags(client, hub, run):
    push_all(run)
    old = hub.repository(REPO).tags
    edit(run / "task-02" / "results.json", trained="again")
    pusher = pusher_of(run)
    pusher.push(1, 2)
    assert pusher.finish() == []
    tags = hub.repository(REPO).tags
    assert set(tags) == {"task-01", "task-02"}
    assert tags["task-01"] == old["task-01"]
    assert tags["task-02"] == hub.repository(REPO).branches["main"] != old["task-02"]
    assert titles(hub)[-2:] == ["Task 3 of 3", "Task 2 of 3"]  # what was there stays in the history


def test_no_local_path_is_pushed(client, hub, run, tmp_path):
    recipe = {"dataset_path": "data/here", "held_out": [f"cifar10={tmp_path}/c10"], "output_dir": str(run)}
    for name in ("task.json", "results.json"):
        edit(run / "task-01" / name, recipe=recipe, classes=["/slash"])
    files = {
        name: content if isinstance(content, bytes) else content.read_bytes()
        for name, content in public_files(run / "task-01", REPO).items()
    }
    for name, content in files.items():
        for path in (str(tmp_path), str(run), str(sample_path("mini-clip")), "data/here"):
            assert path.encode() not in content, (name, path)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == REPO
    pushed = json.loads(files["results.json"])
    assert pushed["recipe"]["held_out"] == ["cifar10=c10"]
    assert pushed["recipe"]["dataset_path"] == "here"
    assert pushed["classes"] == ["/slash"]  # a class may be called anything
    local = json.loads((run / "task-01" / "adapter_config.json").read_text())
    assert local["base_model_name_or_path"] == str(sample_path("mini-clip"))


def test_a_recipe_without_local_paths_is_the_same_on_another_machine():
    one = {"model_name_or_path": "/home/a/clip", "dataset_path": "x/data", "datasets": ["user/set"]}
    other = {"model_name_or_path": "models/clip", "dataset_path": "/y/data", "datasets": ["user/set"]}
    assert public_recipe(one, True) == public_recipe(other, True)
    assert public_recipe(one, True)["datasets"] == ["user/set"]
    assert public_recipe({"model_name_or_path": "openai/clip"}, False) == {"model_name_or_path": "openai/clip"}


def test_an_expression_that_begins_like_a_path_stays_whole():
    layers = [r"\.layers\.1\.", r"~ \.2\."]
    recipe = {"zo_layers": layers, "frozen_parameters": [r"\.lora_A\."], "optim_target_modules": r"\.q_proj"}
    recipe |= {"prompt_template": "/ a {} /", "class_names": ["/m/01g317", "~"]}
    recipe |= {"adapter_config": {"target_modules": r"\.(q|v)_proj", "modules_to_save": [r"\.norm"]}}
    assert public_recipe(recipe, True) == recipe
    recipe["adapter_config"]["weights"] = "/home/me/start"
    assert public_recipe(recipe, True)["adapter_config"]["weights"] == "start"


def test_a_local_base_model_comes_along(client, hub, run, tmp_path):
    shutil.copytree(sample_path("mini-clip"), tmp_path / "my-clip")
    edit(run / "task-01" / "task.json", base_model=str(tmp_path / "my-clip"))
    edit(run / "task-01" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "my-clip"))
    here, processor = load_task_checkpoint(run, task=1)
    pusher = pusher_of(run)
    pusher.push(1)
    assert pusher.finish() == []
    shutil.rmtree(tmp_path / "my-clip")
    there, _ = load_task_checkpoint(REPO, task=1)
    clip = CLIPModel.from_pretrained(REPO, revision="task-01").eval()
    pixels = torch.randn(2, 3, 32, 32)
    prompt = processor.tokenizer("a photo of a cat.", return_tensors="pt")
    with torch.no_grad():
        expected = here(pixel_values=pixels).logits
        assert torch.equal(there(pixel_values=pixels).logits, expected)
        assert torch.allclose(clip(pixel_values=pixels, **prompt).logits_per_image, expected, atol=1e-4)
    assert read_json(hub.repository(REPO).path("main", "task.json"))["base_model"] == "my-clip"


def test_a_local_base_model_that_is_gone_is_named_and_the_rest_waits(client, hub, run, tmp_path):
    for name in TASKS:
        edit(run / name / "task.json", base_model="my-clip")
        edit(run / name / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    assert push_all(run) == list(TASKS)
    assert f"its local base model, {tmp_path / 'gone'}, is missing" in PushQueue.read(run).error


PASSING = {
    "refused before the commit": ("drop", "POST .*/commit/", {}),
    "lost answer to a commit": ("drop-download", "POST .*/commit/", {}),
    "lost answer to a tag": ("drop-download", "POST .*/tag/", {}),
    "409": ("status", "POST .*/commit/", {"status": 409}),
    "412": ("status", "POST .*/commit/", {"status": 412}),
    "429": ("status", "POST .*/commit/", {"status": 429, "headers": {"Retry-After": "1"}}),
    "500": ("status", "POST .*/commit/", {"status": 500}),
    "503": ("status", "GET .*/refs", {"status": 503}),
    "no JSON": ("truncate", "GET .*/tree/", {}),
    "reset in mid-upload": ("drop-upload", "PUT /lfs/", {}),
    "reset in mid-commit": ("drop-upload", "POST .*/commit/", {}),
    "damaged upload": ("corrupt", "PUT /lfs/", {}),
    "slow": ("slow", "POST .*/commit/", {"seconds": 1}),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_leaves_no_trace(client, hub, run, fault):
    kind, pattern, options = PASSING[fault]
    ordered = hub.order(kind, pattern, **options)
    assert push_all(run) == []
    assert ordered.times == 0
    assert is_complete(hub)
    assert not (run / QUEUE_FILE).exists()


@pytest.mark.parametrize("status", [401, 403, 429, 503])
def test_what_cannot_be_pushed_waits_in_the_queue(client, hub, run, status, capfd):
    pusher = pusher_of(run)
    pusher.check()
    headers = {"Retry-After": "9999"} if status == 429 else {}
    fault = hub.order("status", "POST .*/commit/", times=10**6, status=status, headers=headers)
    for number in (1, 2, 3):
        pusher.push(number)
    assert pusher.finish() == list(TASKS)
    queue = PushQueue.read(run)
    assert (queue.pending, queue.repo_id) == (list(TASKS), "run")
    assert str(status) in queue.error
    if status in (401, 403):
        assert "needs the right to write to run" in queue.error
        assert pusher.token is None
    assert hub.token not in (run / QUEUE_FILE).read_text()
    assert titles(hub) == ["initial commit"]
    fault.times = 0
    assert push_all(run) == []
    assert is_complete(hub)


def test_a_later_task_pushes_what_an_earlier_one_could_not(client, hub, run):
    pusher = pusher_of(run)
    fault = hub.order("status", "POST .*/commit/", times=10**6, status=403)
    pusher.push(1)
    while pusher._worker is not None:
        pusher._worker.join(0.1)
    fault.times = 0
    pusher.push(2)
    pusher.push(3)
    assert pusher.finish() == []
    assert is_complete(hub)


def test_a_task_that_comes_as_the_last_one_is_done_is_not_forgotten(client, hub, run, monkeypatch):
    pusher = pusher_of(run)
    drain, more = pusher.drain, [2, 3]

    def drain_and_come():
        outcomes = drain()
        if more:  # the worker has found nothing left, and is still there
            pusher.push(more.pop(0))
        return outcomes

    monkeypatch.setattr(pusher, "drain", drain_and_come)
    pusher.push(1)
    pusher._worker.join(60)
    assert is_complete(hub)


def test_a_hub_that_is_down_stops_nothing(run, tmp_path, monkeypatch):
    with HubServer(tmp_path / "hub") as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
    assert push_all(run) == list(TASKS)  # connection refused, from the first request on
    assert "Connect" in PushQueue.read(run).error
    with HubServer(tmp_path / "hub", port=int(hub.url.rsplit(":", 1)[1])) as again:
        assert push_all(run) == []
        assert is_complete(again)


def test_a_hub_that_is_switched_off_stops_nothing(run):
    assert constants.is_offline_mode()  # the tests' own setting
    assert push_all(run) == list(TASKS)
    assert "OfflineModeIsEnabled" in PushQueue.read(run).error


def test_a_hub_that_never_answers_is_left_to_the_next_run(client, hub, run):
    pusher = pusher_of(run)
    hub.order("slow", "POST .*/commit/", seconds=4)
    pusher.push(1)
    worker = pusher._worker
    assert pusher.finish(patience=1) == ["task-01"]
    assert PushQueue.read(run).pending == ["task-01"]
    # Left alone it would meet a Hub that is gone, and huggingface_hub then closes the client that all tests share.
    worker.join(60)


def test_a_full_disk_stops_no_push(client, hub, run, caplog, monkeypatch):
    # Every write of the queue finds no space left.
    monkeypatch.setattr("hf_zocl.hub.push.write_json", lambda path, content: Path("/dev/full").write_text("{}"))
    assert push_all(run) == []
    assert is_complete(hub)
    assert "No space left on device" in caplog.text
    assert "--resume" in caplog.text


def test_a_repository_that_was_deleted_is_made_again(client, hub, run):
    pusher = pusher_of(run)
    pusher.push(1)
    assert pusher.finish() == []
    client.delete_repo(REPO)
    pusher.push(1, 2, 3)
    assert pusher.finish() == []
    assert is_complete(hub)


def test_a_wrong_token_and_a_wrong_name_are_said_before_any_work(client, hub, run, monkeypatch):
    with pytest.raises(ValueError, match=r"hub_model_id='run'.*Invalid credentials.*hub_token") as error:
        pusher_of(run, token="hf_wrongWrongWrongWrong").check()
    assert "hf_wrong" not in str(error.value)
    with pytest.raises(ValueError, match="hub_model_id='somebody/else'.*403"):
        pusher_of(run, repo_id="somebody/else").check()
    with pytest.raises(ValueError, match="hub_model_id='a b': expected name or user/name"):
        pusher_of(run, repo_id="a b")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="there is no token: pass hub_token"):
        pusher_of(run).check()


def test_a_private_repository_is_private(client, hub, run):
    assert push_all(run, private=True, token=hub.token) == []
    assert hub.repository(REPO).private


def run_script(run: Path, monkeypatch, capsys, *arguments: str) -> tuple[int | str | None, list[str]]:
    monkeypatch.setattr(sys, "argv", ["push.py", str(run), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "push.py"), run_name="__main__")
    return end.value.code, [line for line in capsys.readouterr().out.splitlines() if line]


def test_the_script_pushes_what_the_queue_holds(client, hub, run, monkeypatch, capsys):
    refusal = hub.order("status", "POST .*/commit/", times=10**6, status=403)
    assert push_all(run) == list(TASKS)
    code, lines = run_script(run, monkeypatch, capsys)
    assert code == 1
    assert [line.split()[0] for line in lines[:3]] == list(TASKS)
    assert "403" in lines[0] and "needs the right to write" in lines[0]
    assert lines[-1] == "0 of 3 are on tester/run."
    refusal.times = 0
    code, lines = run_script(run, monkeypatch, capsys)
    assert (code, lines[-1]) == (0, "3 of 3 are on tester/run.")
    assert [line.split() for line in lines[:3]] == [[name, "pushed"] for name in TASKS]
    assert is_complete(hub)
    code, lines = run_script(run, monkeypatch, capsys)  # of a run that was pushed: a check
    assert (code, [line.split()[1] for line in lines[:3]]) == (0, ["unchanged"] * 3)


def test_the_script_pushes_a_run_that_was_never_pushed(client, hub, run, monkeypatch, capsys, tmp_path):
    assert run_script(run, monkeypatch, capsys, "--hub_model_id", "other", "--hub_private_repo")[0] == 0
    assert hub.repository("tester/other").private
    assert list(hub.repository("tester/other").tags) == list(TASKS)
    code, _ = run_script(tmp_path, monkeypatch, capsys)
    assert code.startswith(f"error: {tmp_path}: expected a run's folder")


def test_the_script_leaves_the_queue_of_another_repository(client, hub, run, monkeypatch, capsys):
    PushQueue(run, "run", pending=["task-03"]).write()
    assert run_script(run, monkeypatch, capsys, "--hub_model_id", "other")[0] == 0
    queue = PushQueue.read(run)
    assert (queue.repo_id, queue.pending) == ("run", ["task-03"])


def test_the_script_pushes_the_tasks_that_the_results_speak_of(client, hub, run, monkeypatch, capsys):
    shutil.copyfile(run / "task-02" / "results.json", run / "results.json")  # killed before it wrote the third
    code, lines = run_script(run, monkeypatch, capsys)
    assert (code, lines[-1]) == (0, "2 of 2 are on tester/run.")
    (run / "results.json").write_text("{")
    code, _ = run_script(run, monkeypatch, capsys)
    assert code.startswith(f"error: {run / 'results.json'} is damaged")


@pytest.mark.parametrize("text", ["[]", "{", '{"repo_id": "run", "token": "x"}', '{"repo_id": "run", "pending": 3}'])
def test_a_queue_that_is_none_is_named(tmp_path, text):
    (tmp_path / QUEUE_FILE).write_text(text)
    with pytest.raises(ValueError, match=QUEUE_FILE):
        PushQueue.read(tmp_path)


@pytest.mark.parametrize("name", ["task.json", "adapter_model.safetensors"])
def test_a_checkpoint_that_is_damaged_here_is_named_and_not_tried_again(client, hub, run, caplog, name):
    with (run / "task-02" / name).open("a") as file:
        file.write("}")
    assert push_all(run) == ["task-02", "task-03"]
    assert f"{run / 'task-02' / name} is damaged" in PushQueue.read(run).error
    assert "again in" not in caplog.text
    assert list(hub.repository(REPO).tags) == ["task-01"]


def test_arguments_do_not_show_their_token(tmp_path):
    args = ZOCLTrainingArguments(output_dir=str(tmp_path), hub_token="hf_secretSecretSecret", use_cpu=True)
    shown = f"{args} {args!r} {Recipe(RunArguments(), AdapterArguments(), args)!r} {args.to_json_string()}"
    assert "hf_secret" not in shown


@pytest.mark.parametrize("strategy", HUB_STRATEGIES)
def test_strategies_are_the_trainers_and_one_more(tmp_path, strategy):
    args = ZOCLTrainingArguments(output_dir=str(tmp_path), hub_strategy=strategy, use_cpu=True)
    assert args.hub_strategy == strategy == args.to_dict()["hub_strategy"]
    assert strategy == "every_task" or args.hub_strategy == HubStrategy(strategy)
    assert replace(args, hub_token=None).hub_strategy == strategy


def test_an_unknown_strategy_and_a_revision_are_named(tmp_path):
    with pytest.raises(ValueError, match="hub_strategy='sometimes' is unknown: expected one of every_task, end"):
        ZOCLTrainingArguments(output_dir=str(tmp_path), hub_strategy="sometimes")
    args = ZOCLTrainingArguments(output_dir=str(tmp_path), hub_revision="dev", use_cpu=True)
    with pytest.raises(ValueError, match="hub_revision='dev'"):
        HubPusher.from_arguments(args)


def test_tokens_are_redacted():
    text = "Bearer abc.def at https://user:secret@host/x with hf_abcdefghijklmnop and my-token"
    assert redact(text, "my-token") == "Bearer <token> at https://<token>@host/x with <token> and <token>"


@pytest.mark.parametrize("token", ["hf_oauth_eyJh-bGci.eyJz_dWIi.c2ln", "hf_jwt_eyJh.x", "api_org_abcDEF"])
def test_tokens_of_other_kinds_are_redacted(token):
    assert redact(f"with {token} it failed") == "with <token> it failed"


@pytest.mark.parametrize("name", ["task-²", "task-٠٣", "task-00", "task-3", "task-", "task--1"])
def test_what_is_called_almost_like_a_task_is_none(name):
    assert not is_task_name(name)


def test_a_run_is_fetched_as_it_was_pushed(client, hub, run, tmp_path):
    push_all(run)
    assert fetch_run("run", tmp_path / "fetched") == 3
    repository = hub.repository(REPO)
    for name in TASKS:
        for path in set(repository.files(name)) - {".gitattributes"}:
            assert (tmp_path / "fetched" / name / path).read_bytes() == repository.path(name, path).read_bytes()
    there = [name for name in ("predictions.safetensors",) if (tmp_path / "fetched" / TASKS[-1] / name).is_file()]
    assert sorted(path.name for path in (tmp_path / "fetched").iterdir()) == [
        "accuracy_matrix.png",
        *there,
        "results.json",
        *TASKS,
    ]
    pusher = pusher_of(tmp_path / "fetched")
    pusher.queue.pending = list(TASKS)
    assert pusher.drain() == dict.fromkeys(TASKS, "unchanged")
    for place in (tmp_path / "fetched", REPO):
        model, _ = load_task_checkpoint(place, task=2)
        assert model.class_names == ("cat", "dog")


def test_a_run_is_not_fetched_over_another(client, hub, run):
    with pytest.raises(ValueError, match="holds a run already"):
        fetch_run(REPO, run)
    assert {*TASKS, "results.json"} <= {path.name for path in run.iterdir()}


def test_a_mixture_of_experts_comes_back(client, hub, tmp_path):
    folder = save_checkpoint(tmp_path, task=3, adapter="moe")
    pusher = pusher_of(tmp_path)
    pusher.push(3)
    assert pusher.finish() == []
    here, processor = load_task_checkpoint(folder)
    there, _ = load_task_checkpoint(REPO, task=3)
    clip = CLIPModel.from_pretrained(REPO, revision="task-03").eval()
    pixels = torch.randn(2, 3, 32, 32)
    prompts = [f"a photo of a {name}." for name in here.class_names]
    prompts = processor.tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = here(pixel_values=pixels).logits
        assert torch.equal(there(pixel_values=pixels).logits, expected)
        assert torch.allclose(clip(pixel_values=pixels, **prompts).logits_per_image, expected, atol=1e-4)


def test_a_repository_without_tasks_gives_no_run(client, hub, tmp_path):
    assert fetch_run("run", tmp_path / "fetched") == 0
    client.create_repo("run")
    assert fetch_run(REPO, tmp_path / "fetched") == 0
    assert not (tmp_path / "fetched").exists()


@pytest.mark.parametrize(
    "name", ["../evil.json", "/evil.json", "a/../../evil.json", "C:evil.json", "a\\..\\evil.json"]
)
def test_a_file_name_that_leads_out_of_the_folder_is_refused(client, hub, run, tmp_path, name):
    push_all(run)
    repository = hub.repository(REPO)
    described = repository.folder / "commits" / f"{repository.tags['task-02']}.json"
    described.write_text(described.read_text().replace('"processor_config.json"', json.dumps(name)))
    with pytest.raises(OSError, match=f"task-02.*{re.escape(repr(name))} leads out of the folder"):
        fetch_run(REPO, tmp_path / "fetched")
    assert not list(tmp_path.rglob("evil.json"))


def test_a_run_that_cannot_be_fetched_is_an_error(client, hub, run, tmp_path, monkeypatch):
    push_all(run)
    monkeypatch.setattr("hf_zocl.hub.client.WAITS", (0.01,))
    hub.order("status", "GET .*/refs", status=503, times=2)
    with pytest.raises(OSError, match="tester/run: the run cannot be fetched"):
        fetch_run(REPO, tmp_path / "fetched")
    hub.order("status", "(HEAD|GET) .*task.json", status=403, times=20)
    with pytest.raises(OSError, match="task-03"):
        fetch_run(REPO, tmp_path / "fetched")
    assert not (tmp_path / "fetched" / "task-03").exists()


@pytest.mark.parametrize("fetched", [1, 2])
def test_a_fetch_that_was_cut_off_is_no_run_and_begins_again(client, hub, run, tmp_path, monkeypatch, fetched):
    push_all(run)
    fetch, names = repository_module._fetch_task, []

    def cut_off(api, repo_id, name, *rest):
        if len(names) == fetched:
            raise OSError(f"{name}: connection lost")
        names.append(name)
        fetch(api, repo_id, name, *rest)

    monkeypatch.setattr(repository_module, "_fetch_task", cut_off)
    with pytest.raises(OSError, match="connection lost"):
        fetch_run(REPO, tmp_path / "fetched")
    assert not RunFolder(tmp_path / "fetched").holds_run
    monkeypatch.setattr(repository_module, "_fetch_task", fetch)
    assert fetch_run(REPO, tmp_path / "fetched") == 3
    assert RunFolder(tmp_path / "fetched").holds_run


@pytest.mark.parametrize("name", ["task-01/README.md", "task-03/vocab.json", "accuracy_matrix.png", "task-02"])
def test_a_run_is_not_fetched_over_files_of_the_users(client, hub, run, tmp_path, name):
    push_all(run)
    mine = tmp_path / "fetched" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=f"{re.escape(str(mine))} already exists"):
        fetch_run(REPO, tmp_path / "fetched")
    assert [path.read_text() for path in (tmp_path / "fetched").rglob("*") if path.is_file()] == ["mine"]


FOREIGN = {"notes.md": b"mine", "data/train.csv": b"1,2", "pytorch_model.bin": b"weights", "task_list.json": b"[]"}


def commit(hub: HubServer, files: dict[str, bytes], title: str = "mine") -> str:
    repository = hub.repository(REPO)
    return repository.commit("main", title, {name: (hub.keep(content), False) for name, content in files.items()})


def test_what_is_on_main_besides_stays(client, hub, run):
    client.create_repo("run")
    commit(hub, {**FOREIGN, "README.md": b"my card"})
    assert push_all(run) == []
    for revision in ("main", *TASKS):
        for name, content in FOREIGN.items():
            assert hub.repository(REPO).path(revision, name).read_bytes() == content
        assert load_task_checkpoint(REPO, revision=None if revision == "main" else revision)
    assert b"my card" not in hub.repository(REPO).path("main", "README.md").read_bytes()
    assert push_all(run) == []  # and again


def test_what_others_add_to_a_run_stays_also_with_a_name_that_a_checkpoint_may_have(client, hub, run):
    first = pusher_of(run)
    first.push(1)
    assert first.finish() == []
    added = {".eval_results/imagenet.yaml": b"mine", "notes/vocab.json": b"mine"}
    commit(hub, added)
    assert push_all(run) == []
    for name, content in added.items():
        assert hub.repository(REPO).path("main", name).read_bytes() == content
    assert load_task_checkpoint(REPO)


@pytest.mark.parametrize("name", ["vocab.json", "chat_template.jinja", "model-extra.safetensors"])
def test_what_others_add_to_a_run_is_named_where_it_would_be_read_with_it(client, hub, run, name):
    first = pusher_of(run)
    first.push(1)
    assert first.finish() == []
    head = commit(hub, {name: b"mine"})
    pusher = pusher_of(run)
    with pytest.raises(ValueError, match=rf"holds something else \({name}\)"):
        pusher.check()
    pusher = pusher_of(run)
    pusher.repo_id = REPO  # it was asked before
    pusher.push(2)
    assert pusher.finish() == ["task-02"]
    assert f"somebody has put {name} on main" in PushQueue.read(run).error
    assert hub.repository(REPO).branches["main"] == head
    hub.repository(REPO).commit("main", "gone", {name: None})
    assert push_all(run) == []


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "adapter_config.json"])
def test_a_repository_of_another_model_is_refused_before_any_work(client, hub, run, name):
    client.create_repo("run")
    head = commit(hub, {name: b"{}"})
    pusher = pusher_of(run)
    with pytest.raises(ValueError, match=rf"hub_model_id='run': .* holds something else \({name}\)"):
        pusher.check()
    pusher.push(1)  # of a Hub that was down when it was asked
    assert pusher.finish() == ["task-01"]
    assert "holds something else" in PushQueue.read(run).error
    assert hub.repository(REPO).branches["main"] == head


def test_a_tag_of_a_tasks_name_that_is_anothers_stays(client, hub, run):
    client.create_repo("run")
    client.create_tag(REPO, tag="task-02")
    with pytest.raises(ValueError, match="holds something else .the tag task-02."):
        pusher_of(run).check()
    assert set(hub.repository(REPO).tags) == {"task-02"}


def test_a_tag_that_another_makes_in_between_is_not_taken_for_ours(client, hub, run, monkeypatch):
    pusher = pusher_of(run)
    pusher.check()
    api, made = type(pusher._api()), []
    create = api.create_tag

    def raced(self, repo_id, *, tag, revision, **kwargs):
        if not made:
            made.append(create(self, repo_id, tag=tag, revision=hub.repository(REPO).history()[-1]["id"]))
        return create(self, repo_id, tag=tag, revision=revision, **kwargs)

    monkeypatch.setattr(api, "create_tag", raced)
    for number in (1, 2, 3):
        pusher.push(number)
    assert pusher.finish() == []
    assert is_complete(hub)


def test_a_task_whose_folder_is_gone_is_named_by_the_script(client, hub, run, monkeypatch, capsys):
    shutil.rmtree(run / "task-02")
    code, lines = run_script(run, monkeypatch, capsys)
    assert code == 1
    assert lines[0].split() == ["task-01", "pushed"]
    assert "task-02 is not a task checkpoint" in lines[1]
    assert lines[-1] == "1 of 3 are on tester/run."


def answer(status: int, **headers: str) -> Exception:
    error = OSError("an answer")
    error.response = httpx.Response(status, headers=headers)
    return error


def test_how_long_the_hub_asks_to_wait_for():
    in_a_minute = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=60), usegmt=True)
    assert asked_wait(answer(429, **{"Retry-After": "7"})) == 7
    assert 55 < asked_wait(answer(429, **{"Retry-After": in_a_minute})) <= 60
    assert asked_wait(answer(429, **{"RateLimit": '"api";r=0;t=55'})) == 55
    assert asked_wait(answer(429, **{"RateLimit": '"api";r=3;t=55'})) == 0
    assert asked_wait(answer(429, **{"Retry-After": "soon"})) == 0
    assert asked_wait(OSError("no answer")) == 0


def test_a_date_beyond_reach_lets_the_task_wait_in_the_queue(client, hub, run):
    pusher = pusher_of(run)
    pusher.check()
    later = format_datetime(datetime.now(timezone.utc) + timedelta(hours=2), usegmt=True)
    fault = hub.order("status", "POST .*/commit/", times=10**6, status=429, headers={"Retry-After": later})
    pusher.push(1)
    assert pusher.finish() == ["task-01"]
    assert fault.times >= 10**6 - 2  # once, and perhaps once more at the end


@pytest.mark.parametrize("fault", ["500", pytest.param("reset", marks=pytest.mark.slow)])
def test_a_fault_that_passes_ends_no_load_and_no_fetch(client, hub, run, tmp_path, monkeypatch, fault):
    push_all(run)
    monkeypatch.setattr("hf_zocl.hub.client.WAITS", (0.01, 0.01))
    kind, options = ("status", {"status": 500}) if fault == "500" else ("drop", {})
    orders = [hub.order(kind, pattern, **options) for pattern in ("GET .*/revision/", "GET .*/tree/")]
    assert load_task_checkpoint(REPO, task=1)
    orders += [hub.order(kind, pattern, **options) for pattern in ("GET .*/refs", "GET .*/(tree|revision)")]
    assert fetch_run(REPO, tmp_path / "fetched") == 3
    assert [order.times for order in orders] == [0] * 4


def test_a_hub_that_does_not_answer_holds_nothing_for_ever(client, hub, run, tmp_path, monkeypatch, caplog):
    logging.getLogger("hf_zocl").propagate = True
    push_all(run)
    assert load_task_checkpoint(REPO, task=1)
    monkeypatch.setattr("hf_zocl.hub.client.ANSWER_PATIENCE", 0.2)
    fault = hub.order("slow", "GET ", times=10**6, seconds=2)
    assert load_task_checkpoint(REPO, task=1)  # downloaded before
    assert "using what was downloaded before" in caplog.text
    with pytest.raises(OSError, match="has not answered for 0.2 s"):
        load_task_checkpoint(REPO, task=2)
    with pytest.raises(OSError, match="cannot be fetched .*has not answered for 0.2 s"):
        fetch_run(REPO, tmp_path / "fetched")
    fault.times = 0


def test_a_damaged_download_says_how_to_fetch_it_anew(client, hub, run, tmp_path):
    push_all(run)
    folder = find_task_checkpoint(REPO, task=1)
    blob = (folder / "adapter_model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"damaged.* force_download=True fetches it again"):
        load_task_checkpoint(REPO, task=1)
    assert load_task_checkpoint(REPO, task=1, force_download=True)
