"""The demo as a Space: an app that shows one repository, with a copy of the package as it is here."""

from __future__ import annotations

import re
import sys
from importlib.metadata import requires, version
from pathlib import Path

from huggingface_hub import HfApi, get_token

import hf_zocl

from ..files import read_json
from ..hub.push import PushQueue
from ..hub.series import tasks_of
from ..hub.space import APP_FILE, push_space
from ..report import RESULTS_FILE


MARK = '"""The demo of a run, made by `python -m hf_zocl demo --push_space`."""\n'
APP = (
    MARK
    + """
from hf_zocl.demo.page import launch_page, make_page


launch_page(make_page({repository!r}))
"""
)
CARD = """---
title: {title}
emoji: 🖼️
colorFrom: green
colorTo: gray
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
models:
- {repository}
tags:
- continual-learning
- hf_zocl
---

What [{repository}](https://huggingface.co/{repository}) predicts for an image before training and after each task:
move the slider. The folder `hf_zocl/` is the package, as it was when this Space was pushed.
"""
# Files of the package that the app needs. The embedded model is left out: a repository has its base model.
PACKAGED = (".py", ".yaml", ".json", ".html", ".css", ".md", ".parquet")


def push_demo(run: str, space: str, token: str | None = None, private: bool | None = None) -> str:
    """Push a Space that shows a repository.

    Args:
        run: The repository, or the folder of a run that was pushed to one.
        space: The Space, `name` or `user/name`.
        token: A token that may write; default: the one of `HF_TOKEN` or `hf auth login`.
        private: Whether a new Space is private.

    Returns:
        The Space's full name.

    Raises:
        ValueError: If the run is in no repository, or the Space holds something else (`push_space`).
    """
    repository = repository_of(run, token)
    tasks_of(repository, **({} if token is None else {"token": token}))  # fails here rather than in the Space
    return push_space(space, space_files(repository), MARK, token, private)


def repository_of(run: str, token: str | None = None) -> str:
    """The full name of the repository that holds a run."""
    folder, name = Path(run), run
    if folder.is_dir():
        queue = PushQueue.read(folder)
        recipe = read_json(folder / RESULTS_FILE).get("recipe", {})
        name = queue.repo_id if queue is not None else recipe.get("hub_model_id") or ""
        if not name and recipe.get("push_to_hub"):
            name = folder.absolute().name
        if not name:
            raise ValueError(
                f"{run} was not pushed to the Hub, from where a Space loads it: run `python -m hf_zocl push {run} "
                "--hub_model_id USER/NAME`, and give that name instead."
            )
    if "/" not in name:
        if (token := token or get_token()) is None:
            raise ValueError(f"{name}: without a token the user is not known: give user/{name}.")
        name = f"{HfApi(token=token).whoami()['name']}/{name}"
    return name


def space_files(repository: str) -> dict[str, Path | bytes]:
    """The files of the Space: path in it → file or content."""
    python = ".".join(map(str, sys.version_info[:2]))
    title = re.sub(r"[^\w .-]", " ", repository.rpartition("/")[2])
    card = CARD.format(
        title=f'"{title}, task by task"', gradio=version("gradio"), python=python, repository=repository
    )
    needed = [line for line in requires("hf_zocl") or () if "extra ==" not in line]
    files: dict[str, Path | bytes] = {
        APP_FILE: APP.format(repository=repository).encode(),
        "README.md": card.encode(),
        "requirements.txt": ("\n".join(needed) + "\n").encode(),
    }
    package = Path(hf_zocl.__file__).parent
    for path in sorted(package.rglob("*")):
        place = path.relative_to(package)
        if path.suffix in PACKAGED and path.is_file() and place.parts[:2] != ("sample", "mini-clip"):
            files[f"hf_zocl/{place.as_posix()}"] = path
    return files
