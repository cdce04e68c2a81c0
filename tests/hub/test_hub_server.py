"""The Hub that tests push to answers the real client as the Hub does, and fails when it is told to."""

from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationDelete, HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .hub_server import HubServer


REPO = "tester/run"
LARGE = bytes(range(256)) * 4000


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\nText\n")
    (folder / "sub" / "notes.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(LARGE)
    return folder


@pytest.fixture
def repo(client, folder) -> str:
    client.create_repo(REPO)
    client.upload_folder(repo_id=REPO, folder_path=folder, commit_message="first")
    return REPO


def test_a_repository_is_created_once(client, hub):
    assert client.create_repo("run").repo_id == REPO
    assert client.create_repo("run", exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError) as error:
        client.create_repo("run")
    assert error.value.response.status_code == 409
    assert list(hub.repository(REPO).files()) == [".gitattributes"]


def test_what_is_uploaded_is_what_is_downloaded(client, repo, folder):
    there = snapshot_download(repo)
    for path in folder.rglob("*"):
        if path.is_file():
            assert (client.hf_hub_download(repo, path.relative_to(folder).as_posix())).startswith(there)
            assert Path(there, path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_large_files_go_to_lfs_storage_once(client, repo, hub, folder):
    assert hub.repository(repo).files()["model.safetensors"]["lfs"]["size"] == len(LARGE)
    client.upload_file(path_or_fileobj=folder / "model.safetensors", path_in_repo="again.safetensors", repo_id=repo)
    assert len([path for method, path, _ in hub.requests if method == "PUT"]) == 1


def test_a_revision_never_changes(client, repo, folder):
    client.create_tag(repo, tag="task-01")
    (folder / "sub" / "notes.json").write_text('{"second": true}')
    second = client.upload_folder(repo_id=repo, folder_path=folder, commit_message="second").oid
    client.create_commit(repo, [CommitOperationDelete("README.md")], commit_message="third", parent_commit=second)
    assert Path(hf_hub_download(repo, "sub/notes.json", revision="task-01")).read_text() == "{}"
    assert Path(hf_hub_download(repo, "sub/notes.json", revision=second)).read_text() == '{"second": true}'
    assert [c.title for c in client.list_repo_commits(repo)] == ["third", "second", "first", "initial commit"]
    assert "README.md" not in client.list_repo_files(repo)
    assert {tag.name for tag in client.list_repo_refs(repo).tags} == {"task-01"}
    client.delete_tag(repo, tag="task-01")
    with pytest.raises(RevisionNotFoundError):
        client.model_info(repo, revision="task-01")


def test_a_commit_on_an_old_parent_is_refused(client, repo):
    parent = client.list_repo_commits(repo)[-1].commit_id
    with pytest.raises(HfHubHTTPError) as error:
        client.create_commit(repo, [CommitOperationDelete("README.md")], commit_message="late", parent_commit=parent)
    assert error.value.response.status_code == 412


def test_a_tree_comes_in_pages(client, repo, hub):
    hub.page_size = 2
    assert sorted(client.list_repo_files(repo)) == [
        ".gitattributes",
        "README.md",
        "model.safetensors",
        "sub/notes.json",
    ]
    assert [info.path for info in client.get_paths_info(repo, ["README.md", "missing"])] == ["README.md"]
    assert client.model_info(repo).library_name == "peft"


def test_ranges(client, repo, hub):
    url = f"{hub.url}/{repo}/resolve/main/model.safetensors"
    answer = httpx2.get(url, headers={"Range": "bytes=10-19"})
    assert (answer.status_code, answer.content) == (206, LARGE[10:20])
    assert httpx2.get(url, headers={"Range": "bytes=-5"}).content == LARGE[-5:]
    assert httpx2.get(url, headers={"Range": f"bytes={len(LARGE)}-"}).status_code == 416


def test_tokens_and_private_repositories(client, hub):
    client.create_repo("secret", private=True)
    assert client.whoami()["name"] == "tester"
    for token, status in (("hf_wrong", 401), (False, 401)):
        with pytest.raises(HfHubHTTPError) as error:
            HfApi(token=token).model_info("tester/secret")
        assert error.value.response.status_code == status
    with pytest.raises(HfHubHTTPError) as error:
        client.create_repo("somebody/else")
    assert error.value.response.status_code == 403
    with pytest.raises(RepositoryNotFoundError):
        client.model_info("tester/missing")


def test_a_status_is_answered_as_often_as_it_was_ordered(client, repo, hub):
    hub.order("status", "GET /api/models/tester/run$", status=500, times=2)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="500"):
            client.model_info(repo)
    assert client.model_info(repo).id == repo


def test_a_download_that_breaks_off_is_resumed(client, repo, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.order("drop-download", "GET .*/resolve/.*safetensors")
    path = hf_hub_download(repo, "model.safetensors", cache_dir=tmp_path / "fresh")
    assert Path(path).read_bytes() == LARGE
    assert [status for method, path, status in hub.requests if method == "GET" and "resolve" in path] == [200, 206]


@pytest.mark.parametrize("kind", ["drop", "truncate"])
def test_a_download_that_stays_broken_leaves_no_file(client, repo, hub, tmp_path, kind):
    hub.order(kind, "(HEAD|GET) .*/resolve/.*README", times=20)
    with pytest.raises((OSError, LocalEntryNotFoundError, httpx2.TransportError)):
        hf_hub_download(repo, "README.md", cache_dir=tmp_path / "fresh", etag_timeout=1)
    assert not list((tmp_path / "fresh").rglob("README.md"))


def test_a_damaged_upload_is_refused(client, hub, folder):
    client.create_repo(REPO)
    hub.order("corrupt", "PUT /lfs/")
    with pytest.raises(RuntimeError, match=r"model\.safetensors") as error:
        client.upload_folder(repo_id=REPO, folder_path=folder)
    assert "did not arrive whole" in str(error.value.__cause__)
    assert list(hub.repository(REPO).files()) == [".gitattributes"]


def test_a_folder_that_a_server_left_goes_on(client, repo, hub):
    with HubServer(hub.folder) as again:
        assert again.repository(repo).history()[0]["title"] == "first"
