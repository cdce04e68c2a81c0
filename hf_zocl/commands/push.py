"""Push what a run could not push, or a run that was never pushed: `python -m hf_zocl push runs/quickstart`."""

import logging
import sys
from pathlib import Path

from ..files import read_json
from ..hub.checkpoint import RESULTS_FILE, complete_tasks
from ..hub.push import HubPusher, PushQueue
from ..hub.task_info import task_folder
from .door import Parser, command


@command
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("output_dir", type=Path, help="A run's folder.")
    parser.add_argument("--hub_model_id", help="name or user/name; default: the run's own.")
    parser.add_argument("--hub_token", help="Default: HF_TOKEN, or the token of `hf auth login`.")
    parser.add_argument("--hub_private_repo", action="store_true", default=None, help="Make a new repository private.")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    outcomes, left, where = push_run(args.output_dir, args.hub_model_id, args.hub_token, args.hub_private_repo)
    for name, outcome in outcomes.items():
        print(f"{name:<10} {outcome}")
    for name in left:
        if name not in outcomes:
            print(f"{name:<10} waits for the task before it")
    print(
        f"\n{len(outcomes) - sum(name in left for name in outcomes)} of {len(outcomes.keys() | left)} are on {where}."
    )
    sys.exit(1 if left else 0)


def push_run(
    output_dir: Path, repo_id: str | None, token: str | None, private: bool | None
) -> tuple[dict[str, str], list[str], str]:
    """Push the queue that a run left in its folder; without one, all complete tasks.

    Raises:
        ValueError: If there is nothing to push, no token, or no repository name.
    """
    queue = PushQueue.read(output_dir)
    tasks = complete_tasks(output_dir)
    if not tasks:
        raise ValueError(f"{output_dir}: expected a run's folder with at least one complete task (task-01 and so on).")
    if queue is not None:
        repo_id, private = repo_id or queue.repo_id, queue.private if private is None else private
    elif repo_id is None and (output_dir / RESULTS_FILE).is_file():
        repo_id = read_json(output_dir / RESULTS_FILE).get("recipe", {}).get("hub_model_id")
    pusher = HubPusher(output_dir, repo_id, token, private)
    pusher.check()
    complete = [task_folder(task) for task in tasks]
    is_rest = queue is not None and repo_id == queue.repo_id
    pusher.queue.pending = [name for name in complete if name in queue.pending] if is_rest else complete
    outcomes = pusher.drain()
    if queue is not None and not is_rest:
        queue.write()  # this push went elsewhere, so the tasks still wait for the queue's repository
    return outcomes, pusher.queue.pending, pusher.repo_id or pusher.queue.repo_id
