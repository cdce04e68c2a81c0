"""A demo that is pushed as a Space: what is in it, that it runs, and what it never overwrites."""

import os
import subprocess
import sys

import pytest
import yaml

from hf_zocl.commands.push import push_run
from tests.demo.runs import save_run
from tests.hub.conftest import client, hub  # noqa: F401


pytest.importorskip("gradio")
from hf_zocl.demo.space import push_demo


SPACE = "tester/demo"


@pytest.fixture
def pushed(tmp_path, client):  # noqa: F811
    run = save_run(tmp_path / "run", tasks=2)
    push_run(run, "tester/run", None, None)
    return client


def test_a_space_has_an_app_its_requirements_and_a_card(pushed, hub, tmp_path):  # noqa: F811
    assert push_demo("tester/run", "demo") == SPACE
    folder = hub.repository(f"spaces/{SPACE}").path()
    card = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["models"] == ["tester/run"]
    assert card["sdk_version"] == pytest.importorskip("gradio").__version__
    needed = (folder / "requirements.txt").read_text()
    assert "torch" in needed and "extra" not in needed and "gradio" not in needed
    assert not list(folder.glob("hf_zocl/sample/mini-clip/*")) and (folder / "hf_zocl/py.typed").exists() is False
    # The app runs with the package that lies beside it, and shows the repository.
    script = "import gradio; gradio.Blocks.launch = lambda page, **how: print(page.title, how['server_name'])\n"
    script += "import runpy, hf_zocl; runpy.run_path('app.py'); print(hf_zocl.__file__)"
    rest = os.environ.get("PYTHONPATH", "").split(os.pathsep)[1:]  # without the checkout
    path = os.pathsep.join([str(folder), *rest])
    environment = {**os.environ, **hub.environment(tmp_path / "other-cache"), "PYTHONPATH": path}
    ran = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[:2] == ["tester/run · hf_zocl None", str(folder / "hf_zocl" / "__init__.py")]


def test_pushing_again_changes_nothing_and_leaves_other_files_alone(pushed, hub):  # noqa: F811
    push_demo("tester/run", SPACE)
    pushed.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id=SPACE, repo_type="space")
    commits = len(hub.repository(f"spaces/{SPACE}").history())
    push_demo("tester/run", SPACE)
    assert len(hub.repository(f"spaces/{SPACE}").history()) == commits
    assert (hub.repository(f"spaces/{SPACE}").path() / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("file", ["app.py", "index.html"])
def test_a_space_that_holds_something_else_is_never_overwritten(file, pushed, hub):  # noqa: F811
    pushed.create_repo(SPACE, repo_type="space", space_sdk="gradio")
    pushed.upload_file(path_or_fileobj=b"import mine\n", path_in_repo=file, repo_id=SPACE, repo_type="space")
    with pytest.raises(ValueError, match=rf"the Space {SPACE} holds something else \({file}\).*choose another one"):
        push_demo("tester/run", SPACE)
    assert (hub.repository(f"spaces/{SPACE}").path() / file).read_bytes() == b"import mine\n"


def test_a_space_that_the_hubs_form_made_is_taken(pushed, hub):  # noqa: F811
    pushed.create_repo(SPACE, repo_type="space", space_sdk="gradio")
    pushed.upload_file(
        path_or_fileobj=b"---\nsdk: gradio\n---\n", path_in_repo="README.md", repo_id=SPACE, repo_type="space"
    )
    assert push_demo("tester/run", SPACE) == SPACE


def test_what_is_not_on_the_hub_or_not_allowed_is_refused_before_anything_is_made(pushed, hub, tmp_path):  # noqa: F811
    run = save_run(tmp_path / "own", tasks=1)
    (run / "results.json").write_text('{"recipe": {}, "accuracy_matrix": [[1.0]]}')
    with pytest.raises(ValueError, match="was not pushed to the Hub"):
        push_demo(str(run), SPACE)
    pushed.create_repo("tester/empty")
    with pytest.raises(ValueError, match="tester/empty: expected the repository of a run"):
        push_demo("tester/empty", SPACE)
    with pytest.raises(OSError, match="push_space='somebody/demo'.*no right to write"):
        push_demo("tester/run", "somebody/demo")
    assert not (hub.folder / "repositories" / "spaces").exists()
