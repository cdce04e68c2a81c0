"""Disturb runs at random, and compare how they end with an undisturbed run.

    python scripts/benchmarks/chaos.py --runs 20 --output_dir runs/chaos [--kills 2] [--seed 0] [--table docs/table.md]
    python scripts/benchmarks/chaos.py --what pairs --runs 20
    python scripts/benchmarks/chaos.py --what damage --runs 20

`kills`, the default, kills runs at random moments and resumes them until they are done. `pairs` starts two runs at
once in one folder: one must run, the other must refuse and change nothing. `damage` kills a run, removes or truncates
a random file in its folder, and resumes it: it must end like the undisturbed run, or name in one line what is broken,
and touch nothing else.

Any further argument is an argument of a recipe, and overrides the short recipe below; in it, {run} stands for the
run's number. With --push_to_hub true --hub_model_id me/chaos-{run}, the runs push to the Hub that HF_ENDPOINT names,
and are also killed during pushes. A run is a separate process, forked after the package was imported.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from chaos_phases import PHASES, Trace
from huggingface_hub import HfApi

from hf_zocl.commands import Parser, command
from hf_zocl.commands import train as train_command
from hf_zocl.continual.folder_lock import LOCK_FILE
from hf_zocl.hub.public import public_files
from hf_zocl.hub.repository import changes


RECIPE = """
--recipe quickstart --increment 2 --class_order 3 8 0 1 --partial_order true
--num_train_epochs 2 --logging_steps 4 --save_strategy steps --save_steps 2 --save_total_limit 2
--max_train_images_per_class 24 --max_test_images_per_class 10 --per_device_train_batch_size 16
--zo_queries vision=2,language=2 --lora_dropout 0.1 --disable_tqdm true --use_cpu true
""".split()
ANY = "any moment"
NOT_COMPARED = ("seconds", "peak_memory_bytes", "recipe", "versions")


@dataclass
class Undisturbed:
    """The outcome of a run that is not killed."""

    outcome: dict[str, Any]
    seconds: float
    trace: Trace

    def moment(self, rng: random.Random, aim: str) -> tuple[int | None, int, float]:
        """Draw when to kill: seconds after the n-th beginning of a phase or, without a phase, after the start."""
        if aim == ANY:
            return None, 0, rng.uniform(0, self.seconds)
        number = list(PHASES).index(aim)
        times = int(self.trace.entered[number])
        return number, rng.randint(1, times), rng.uniform(0, self.trace.seconds[number] / times)


@dataclass
class Run:
    """A run that was killed, and resumed until it was done."""

    kills: list[str] = field(default_factory=list)
    attempts: int = 0
    outcome: dict[str, Any] = field(default_factory=dict)


@command
def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("kills", "pairs", "damage"), default="kills")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=2, help="the most that one run is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--table", type=Path, help="a Markdown file for the table")
    options, further = parser.parse_known_args()
    empty(options.output_dir)
    rng = random.Random(options.seed)

    trace, started = Trace(), time.perf_counter()
    folder = options.output_dir / "undisturbed"
    code, _ = attempt(folder, 0, further, trace)
    if code != 0:
        sys.exit(f"error: the undisturbed run failed, see {log_of(folder)}.")
    undisturbed = Undisturbed(outcome_of(folder), time.perf_counter() - started, trace)
    aims = [ANY, *(name for name, times in zip(PHASES, trace.entered, strict=True) if times)]

    folders = [options.output_dir / f"run-{number:02d}" for number in range(1, options.runs + 1)]
    if options.what == "kills":
        table, good = kill_runs(folders, further, undisturbed, aims, options.kills, rng)
    else:
        disturb = start_pair if options.what == "pairs" else damage_run
        outcomes = []
        for number, folder in enumerate(folders, start=1):
            outcomes.append(disturb(folder, number, further, undisturbed, rng))
            print(f"| {number} | {outcomes[-1].row} |", flush=True)
        good = sum(outcome.is_right for outcome in outcomes)
        table = "\n".join(f"| {number} | {outcome.row} |" for number, outcome in enumerate(outcomes, start=1))
        table = f"{HEADS[options.what]}\n{table}\n\n{good} of {len(folders)} {RIGHT[options.what]}"
    print(f"\n{table}")
    if options.table is not None:
        options.table.write_text(table + "\n", encoding="utf-8")
    if good < len(folders):
        sys.exit("error: not every run ended as it must.")


def empty(folder: Path) -> None:
    """Remove what this script wrote into a folder earlier, and make the folder again.

    Raises:
        ValueError: If it holds anything else.
    """
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir())
        foreign = [name for name in names if not re.fullmatch(r"(undisturbed|run-\d+(-[12])?)(\.log)?", name)]
        if foreign or (names and "undisturbed" not in names):
            raise ValueError(
                f"output_dir={str(folder)!r} holds {(foreign or names)[0]!r}, which is not of this script: expected a "
                "new folder, or that of an earlier run of it."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def kill_runs(
    folders: list[Path],
    further: list[str],
    undisturbed: Undisturbed,
    aims: list[str],
    kills: int,
    rng: random.Random,
) -> tuple[str, int]:
    """The table of killed and resumed runs, and the number of those that ended like the undisturbed one."""
    runs = []
    for number, folder in enumerate(folders, start=1):
        own_aims = [aims[(number + kill * (len(aims) // 2)) % len(aims)] for kill in range(kills)]
        runs.append(torment(folder, number, further, undisturbed, own_aims, rng))
        print(row(number, runs[-1], undisturbed), flush=True)
    return markdown(runs, undisturbed), sum(run.outcome == undisturbed.outcome for run in runs)


HEADS = {
    "pairs": "| pair | the second started after | exit codes | what the one that refused said |\n|---:|---|---|---|",
    "damage": "| run | killed while, after | damage | how it ended |\n|---:|---|---|---|",
}
RIGHT = {
    "pairs": "pairs: one ran and ended as the undisturbed run, the other refused in one line.",
    "damage": "runs ended as the undisturbed run, or said in one line what is broken and touched nothing else.",
}


@dataclass
class Disturbed:
    """A row of the table of `pairs` or `damage`, and whether the run ended as it must."""

    row: str
    is_right: bool


def start_pair(
    folder: Path, number: int, further: list[str], undisturbed: Undisturbed, rng: random.Random
) -> Disturbed:
    """Start two runs in one folder, the second up to two seconds after the first."""
    delay = rng.choice([0.0, rng.uniform(0, 2)])
    logs = [folder.with_name(f"{folder.name}-{one}.log") for one in (1, 2)]
    processes = []
    for log in logs:
        processes.append(start(log, folder, number, further, Trace()))
        time.sleep(delay if len(processes) == 1 else 0)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    refusals = [log for log, code in zip(logs, codes, strict=True) if code != 0]
    said = last_line(refusals[0]) if len(refusals) == 1 else "–"
    is_right = sorted(codes) == [0, 1] and said.startswith("error: ") and not has_traceback(refusals[0])
    is_right = is_right and outcome_of(folder) == undisturbed.outcome
    said = said.replace(str(folder), "RUN")
    return Disturbed(f"{delay:.1f} s | {codes[0]}, {codes[1]} | {said}", is_right)


def damage_run(
    folder: Path, number: int, further: list[str], undisturbed: Undisturbed, rng: random.Random
) -> Disturbed:
    """Kill a run, damage a file of its folder, and resume it."""
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        _, killed = attempt(folder, number, further, Trace(), undisturbed.moment(rng, ANY))
        files = contents(folder)
        if killed is not None and files:
            break
    name = rng.choice(sorted(files))
    kept = rng.choice([None, rng.randrange(max(1, len(files[name])))])
    (folder / name).unlink()
    if kept is not None:
        (folder / name).write_bytes(files[name][:kept])
    before, start_of_log = contents(folder), len(log_of(folder).read_text(encoding="utf-8"))
    code, _ = attempt(folder, number, [*further, "--resume", "true"], Trace())
    log = log_of(folder).read_text(encoding="utf-8")[start_of_log:]
    damage = f"{name} {'removed' if kept is None else f'cut to {kept} of {len(files[name])} bytes'}"
    if code != 0:
        said = last_line(log_of(folder))
        is_right = said.startswith("error: ") and "Traceback" not in log and contents(folder) == before
        return Disturbed(f"{killed} | {damage} | {said.replace(str(folder), 'RUN')}", is_right)
    outcome = outcome_of(folder)
    if outcome == undisturbed.outcome:
        return Disturbed(f"{killed} | {damage} | equal", True)
    lost = f"weights of {Path(name).parent}"
    rest = {key: value for key, value in undisturbed.outcome.items() if key != lost}
    is_named = str(folder / name) in log and {k: v for k, v in outcome.items() if k != lost} == rest
    return Disturbed(
        f"{killed} | {damage} | {'equal but for the file, which is named' if is_named else 'DIFFERENT'}", is_named
    )


def contents(folder: Path) -> dict[str, bytes]:
    """The content of the files in a run's folder; a lock is not a file of the run."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK_FILE)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def last_line(log: Path) -> str:
    return log.read_text(encoding="utf-8").strip().splitlines()[-1]


def has_traceback(log: Path) -> bool:
    return "Traceback" in log.read_text(encoding="utf-8")


def torment(
    folder: Path, number: int, further: list[str], undisturbed: Undisturbed, aims: list[str], rng: random.Random
) -> Run:
    """Start a run, kill it once for every aim if it lives long enough, and resume it until it is done."""
    run = Run()
    while True:
        moment = undisturbed.moment(rng, aims[len(run.kills)]) if len(run.kills) < len(aims) else None
        code, killed = attempt(folder, number, [*further, "--resume", str(bool(run.kills))], Trace(), moment)
        run.attempts += 1
        if killed is not None:
            run.kills.append(killed)
        elif code != 0:
            sys.exit(f"error: run {number} failed, see {log_of(folder)}.")
        elif run.kills or not aims:
            run.outcome = outcome_of(folder)
            return run
        else:  # done before the first kill: run again from the beginning
            shutil.rmtree(folder)
            run.attempts = 0


def attempt(
    folder: Path,
    number: int,
    further: list[str],
    trace: Trace,
    moment: tuple[int | None, int, float] | None = None,
) -> tuple[int | None, str | None]:
    """Train in a separate process.

    Returns:
        Its exit code, and what it was doing when it was killed, or None if it was not killed.
    """
    process = start(log_of(folder), folder, number, further, trace)
    deadline, started = None, time.perf_counter()
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), None
        now = time.perf_counter()
        if moment is not None and deadline is None:
            phase, times, delay = moment
            if phase is None:
                deadline = started + delay
            elif trace.entered[phase] >= times:
                deadline = now + delay
        if deadline is not None and now >= deadline:
            os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            if not os.WIFSIGNALED(status):  # the run ended before the kill
                return os.waitstatus_to_exitcode(status), None
            return None, f"{trace.now()}, {now - started:.1f} s"
        time.sleep(0.0002)


def start(log: Path, folder: Path, number: int, further: list[str], trace: Trace) -> int:
    """Start a run in a separate process, and return its process id."""
    arguments = [part.replace("{run}", str(number)) for part in [*RECIPE, *further]]
    process = os.fork()
    if process == 0:
        train(log, [*arguments, "--output_dir", str(folder)], trace)
    return process


def train(log: Path, arguments: list[str], trace: Trace) -> None:
    """What a run's process does; it never returns."""
    code = 1
    try:
        torch.set_num_threads(1)
        with log.open("a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["train", *arguments]
        trace.watch()
        train_command.main()
        code = 0
    except SystemExit as end:
        print(end.code, file=sys.stderr)
        code = int(bool(end.code))
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def log_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def outcome_of(folder: Path) -> dict[str, Any]:
    """The values that must be equal: the results, the hash of every task's weights, and the tags on the Hub."""
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    outcome = {name: value for name, value in results.items() if name not in NOT_COMPARED}
    for file in sorted(folder.glob("task-*/adapter_model.safetensors")):
        outcome[f"weights of {file.parent.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    if results["recipe"].get("push_to_hub"):
        outcome["tags"] = tags_of(folder, results["recipe"]["hub_model_id"])
    return outcome


def tags_of(folder: Path, repo_id: str) -> list[str]:
    """The tags of a run's repository that hold exactly what the run's folder holds."""
    api, whole = HfApi(), []
    for name in sorted(ref.name for ref in api.list_repo_refs(repo_id).tags):
        files = public_files(folder / name, repo_id)
        if not changes(api, repo_id, name, files, lambda path: path != ".gitattributes"):
            whole.append(name)
    return whole


def row(number: int, run: Run, undisturbed: Undisturbed) -> str:
    accuracy = ["/".join(f"{100 * value:.1f}" for value in run.outcome["seen_accuracy"])]
    accuracy += ["equal" if run.outcome == undisturbed.outcome else "DIFFERENT"]
    return f"| {number} | {'; '.join(run.kills)} | {run.attempts} | {' | '.join(accuracy)} |"


def markdown(runs: list[Run], undisturbed: Undisturbed) -> str:
    equal = sum(run.outcome == undisturbed.outcome for run in runs)
    kills = sum(len(run.kills) for run in runs)
    lines = ["| run | killed while, after | starts | accuracy after each task, % | against the undisturbed run |"]
    lines += ["|---:|---|---:|---|---|", *(row(number, run, undisturbed) for number, run in enumerate(runs, start=1))]
    lines += [
        "",
        f"{equal} of {len(runs)} runs, killed {kills} times in all, ended with the accuracies, logs and weights of "
        f"the undisturbed run (which takes {undisturbed.seconds:.1f} s), bit for bit.",
    ]
    if tags := undisturbed.outcome.get("tags"):
        whole = sum(run.outcome["tags"] == tags for run in runs)
        lines[-1] += f" On the Hub, {whole} have {' and '.join(tags)}, with exactly the files of the run's folder."
    return "\n".join(lines)


if __name__ == "__main__":
    main()
