"""A small Hugging Face Hub on loopback: the part of its protocol that models and Spaces need, over real files.

The real `huggingface_hub` client talks to it, with `HF_ENDPOINT` set to `HubServer.url` and Xet storage switched off:

    with HubServer(folder) as hub:
        hub.order("status", r"POST .*/commit/", status=503, times=2)
        subprocess.run([...], env={**os.environ, **hub.environment(cache)})
        hub.repository("tester/run").tags

or, by itself, `python tests/hub/hub_server.py FOLDER --port 8080`. A commit is a folder of files that never changes:
`FOLDER/repositories/USER/NAME/commits/SHA/…`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet")
LFS_SIZE = 10_000_000
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
SPACE_KINDS = ("gradio", "docker", "static")
KINDS = ("status", "drop", "drop-upload", "drop-download", "slow", "corrupt", "truncate")


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose `METHOD /path?query` matches `pattern`.

    Kinds: `status` answers with a status code; `drop` resets the connection before an answer, `drop-upload` after half
    of the request's body, `drop-download` after half of the answer's; `slow` waits first; `corrupt` changes a byte of
    the file that goes up or down; `truncate` ends an answer early, as if it were whole.
    """

    kind: str
    pattern: str
    times: int = 1
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "ordered by a test"
    seconds: float = 0.0


class HubError(Exception):
    """An answer that says no."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Repository:
    """The commits, branches and tags of one repository, in a folder."""

    def __init__(self, folder: Path, objects: Path):
        self.folder, self.objects = folder, objects
        state = folder / "repository.json"
        loaded = json.loads(state.read_text()) if state.is_file() else {}
        self.private: bool = loaded.get("private", False)
        self.branches: dict[str, str] = loaded.get("branches", {})
        self.tags: dict[str, str] = loaded.get("tags", {})

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"private": self.private, "branches": self.branches, "tags": self.tags}
        (self.folder / "repository.json").write_text(json.dumps(state, indent=2))

    def resolve(self, revision: str) -> str:
        """The commit that a branch, a tag or a commit's own name stands for."""
        for names in (self.tags, self.branches):
            if revision in names:
                return names[revision]
        if re.fullmatch("[0-9a-f]{40}", revision) and (self.folder / "commits" / revision).is_dir():
            return revision
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def describe(self, commit: str) -> dict[str, Any]:
        return json.loads((self.folder / "commits" / f"{commit}.json").read_text())

    def files(self, revision: str = "main") -> dict[str, dict[str, Any]]:
        """Path → `oid`, `size` and, of a large file, `lfs`."""
        return self.describe(self.resolve(revision))["files"]

    def path(self, revision: str = "main", name: str = "") -> Path:
        """The folder of a revision, or a file of it."""
        return self.folder / "commits" / self.resolve(revision) / name

    def history(self, revision: str = "main") -> list[dict[str, Any]]:
        """The commits that led to a revision, the newest first."""
        commits, commit = [], self.resolve(revision)
        while commit is not None:
            commits.append(self.describe(commit))
            commit = commits[-1]["parent"]
        return commits

    def commit(self, branch: str, title: str, changes: dict[str, tuple[Path, bool] | None], message: str = "") -> str:
        """Add a commit; `changes`: path → the file that holds its content and whether it is a large one, or None."""
        parent = self.branches.get(branch)
        files = dict(self.files(parent)) if parent else {}
        sources = {name: self.path(parent, name) for name in files}
        for name, change in changes.items():
            if change is None:
                files.pop(name), sources.pop(name)
            else:
                files[name], sources[name] = _entry(*change), change[0]
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        described = {"parent": parent, "title": title, "message": message, "date": date, "files": files}
        commit = hashlib.sha1(json.dumps(described).encode()).hexdigest()
        folder = self.folder / "commits" / commit
        folder.mkdir(parents=True)
        for name, source in sources.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(source, folder / name)
        (folder.parent / f"{commit}.json").write_text(json.dumps({"id": commit, **described}))
        self.branches[branch] = commit
        self.write()
        return commit


def _entry(source: Path, large: bool) -> dict[str, Any]:
    content = source.read_bytes()
    blob = content
    sha256 = hashlib.sha256(content).hexdigest()
    if large:  # git keeps a pointer in its place
        blob = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
    oid = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
    lfs = {"lfs": {"oid": sha256, "size": len(content), "pointerSize": len(blob)}} if large else {}
    return {"oid": oid, "size": len(content), **lfs}


class HubServer:
    """A Hub in a folder, served by a thread of its own.

    Args:
        folder: Where repositories and objects are kept; a folder that a server left goes on from there.
        port: 0 takes a free one.
        users: Token → name of the user who has it; a user writes to the repositories of that name alone.
        page_size: Entries of one page of a repository's tree.
    """

    def __init__(self, folder: Path, port: int = 0, users: dict[str, str] | None = None, page_size: int = 1000):
        self.folder, self.page_size = Path(folder), page_size
        self.users = users or {"hf_testerTesterTesterTesterTester": "tester"}
        self.token, self.user = next(iter(self.users.items()))
        self.objects = self.folder / "objects"
        self.objects.mkdir(parents=True, exist_ok=True)
        self.lock = threading.RLock()
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int | None]] = []
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """The variables under which a process talks to this Hub, as its first user, with a cache of its own."""
        switches = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HOME": str(cache), **switches}

    def order(self, kind: str, pattern: str, times: int = 1, **options: Any) -> Fault:
        """Let the next `times` requests that match go wrong, see `Fault`."""
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}.")
        fault = Fault(kind, pattern, times, **options)
        with self.lock:
            self.faults.append(fault)
        return fault

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def repository(self, repo_id: str) -> Repository:
        folder = self.folder / "repositories" / repo_id
        if not folder.is_dir():
            raise HubError(404, "Repository not found", "RepoNotFound")
        return Repository(folder, self.objects)

    def create(self, repo_id: str, private: bool = False) -> Repository:
        repository = Repository(self.folder / "repositories" / repo_id, self.objects)
        repository.private = private
        attributes = self.keep(GIT_ATTRIBUTES.encode())
        repository.commit("main", "initial commit", {".gitattributes": (attributes, False)})
        return repository

    def keep(self, content: bytes) -> Path:
        """The object with this content, added if it is new."""
        path = self.objects / hashlib.sha256(content).hexdigest()
        if not path.exists():
            unfinished = path.with_name(f".{path.name}-{threading.get_ident()}")
            unfinished.write_bytes(content)
            unfinished.replace(path)
        return path


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is one of the things tested."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are kept in `HubServer.requests`."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _handle(self) -> None:
        self.hub = self.server.hub
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.fault = self.hub.take_fault(f"{self.command} {self.path}") or Fault("none", "")
        if self.fault.kind == "drop":
            return self._reset()
        self.body = b"".join(self._read_body())
        if self.fault.kind == "drop-upload":
            return self._reset()
        if self.fault.kind == "slow":
            time.sleep(self.fault.seconds)
        try:
            if self.fault.kind == "status":
                raise HubError(self.fault.status, self.fault.message)
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method.split():
                    self.user = self._authenticate()
                    return action(self, *(unquote(group or "") for group in match.groups()))
            raise HubError(404, f"no route for {self.command} {url.path}")
        except HubError as error:
            headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
            self._json({"error": error.message}, error.status, {**headers, **self.fault.headers})

    def _read_body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
                if self.fault.kind == "drop-upload":
                    return
            self.rfile.readline()
        else:
            size = int(self.headers.get("Content-Length") or 0)
            yield self.rfile.read(size // 2 if self.fault.kind == "drop-upload" else size)

    def _reset(self) -> None:
        self._note(None)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _note(self, status: int | None) -> None:
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, status))

    def _authenticate(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        user = self.hub.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _readable(self, repo_id: str) -> Repository:
        try:
            repository = self.hub.repository(repo_id)
            if repository.private and self.user != _owner(repo_id):
                raise HubError(404, "Repository not found", "RepoNotFound")
        except HubError as error:
            if self.user is None:  # whoever is not known is not told whether there is such a repository
                raise HubError(401, "Repository not found", "RepoNotFound") from error
            raise
        return repository

    def _writable(self, repo_id: str) -> Repository:
        repository = self._readable(repo_id)
        self._may_write(repo_id)
        return repository

    def _may_write(self, repo_id: str) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        if self.user != _owner(repo_id):
            raise HubError(403, f"{self.user} has no right to write to {repo_id}")

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self._answer(json.dumps(content).encode(), status, headers)

    def _answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        kind = self.fault.kind
        if kind == "corrupt" and body and self.command == "GET":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if kind == "truncate" and self.command == "GET":
            body = body[: len(body) // 2]
        self._note(status)
        self.send_response(status, HTTPStatus(status).phrase if status in iter(HTTPStatus) else "")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "drop-download":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(body)

    # What a client may ask.

    def whoami(self) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write"}
        auth = {"type": "access_token", "accessToken": token}
        self._json({"type": "user", "id": self.user, "name": self.user, "orgs": [], "auth": auth})

    def create_repo(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or self.user}/{asked['name']}"
        kind = asked.get("type") or "model"
        repo_id = f"spaces/{name}" if kind == "space" else name
        self._may_write(repo_id)
        if kind == "space" and asked.get("sdk") not in SPACE_KINDS:
            raise HubError(400, f"sdk: expected one of {', '.join(SPACE_KINDS)}")
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": name}
        with self.hub.lock:
            if (self.hub.folder / "repositories" / repo_id).is_dir():
                return self._json({"error": f"You already created this {kind} repo", **answer}, 409)
            self.hub.create(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return self._json(answer)

    def delete_repo(self) -> None:
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or self.user}/{asked['name']}"
        shutil.rmtree(self._writable(repo_id).folder)
        self._json({})

    def info(self, repo_id: str, revision: str) -> None:
        repository = self._readable(repo_id)
        commit = repository.resolve(revision or "main")
        described = repository.describe(commit)
        siblings = [
            {"rfilename": name, **({"size": f["size"], "blobId": f["oid"]} if "blobs" in self.query else {})}
            for name, f in described["files"].items()
        ]
        card = repository.path(commit, "README.md")
        header = card.read_text(encoding="utf-8").split("---\n")[1] if card.is_file() else ""
        shown = dict(re.findall(r"^(pipeline_tag|library_name): (\S+)$", header, re.MULTILINE))
        answer = {"_id": repo_id, "id": repo_id, "modelId": repo_id, "author": _owner(repo_id), "sha": commit}
        answer |= {"private": repository.private, "disabled": False, "gated": False, "tags": [], "siblings": siblings}
        self._json({**answer, "downloads": 0, "likes": 0, "lastModified": described["date"], **shown})

    def refs(self, repo_id: str) -> None:
        repository = self._readable(repo_id)
        kinds = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        answer = {
            kind: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": commit} for n, commit in names.items()]
            for kind, (ref, names) in kinds.items()
        }
        self._json({**answer, "converts": [], "pullRequests": []})

    def commits(self, repo_id: str, revision: str) -> None:
        history = self._readable(repo_id).history(revision)
        authors = [{"user": _owner(repo_id)}]
        self._json(
            [{"id": c["id"], "authors": authors, **{k: c[k] for k in ("title", "message", "date")}} for c in history]
        )

    def tree(self, repo_id: str, revision: str, folder: str) -> None:
        files = self._readable(repo_id).files(revision)
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        entries: dict[str, dict[str, Any]] = {}
        for name, file in sorted(files.items()):
            if not name.startswith(prefix):
                continue
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                path = prefix + "/".join(parts[:depth])
                if recursive or depth == 1:
                    oid = hashlib.sha1(path.encode()).hexdigest()
                    entries[path] = {"type": "directory", "path": path, "oid": oid, "size": 0}
            if recursive or len(parts) == 1:
                entries[name] = {"type": "file", "path": name, **file}
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        start = int(self.query.get("cursor", ["0"])[0])
        end = start + self.hub.page_size
        headers = {}
        if end < len(entries):
            url = f"{self.hub.url}{urlsplit(self.path).path}?recursive={recursive}&cursor={end}"
            headers["Link"] = f'<{url}>; rel="next"'
        self._json(list(entries.values())[start:end], headers=headers)

    def paths_info(self, repo_id: str, revision: str) -> None:
        files = self._readable(repo_id).files(revision)
        paths = parse_qs(self.body.decode()).get("paths", [])
        self._json([{"type": "file", "path": path, **files[path]} for path in paths if path in files])

    def preupload(self, repo_id: str, revision: str) -> None:
        repository = self._writable(repo_id)
        known = repository.files(revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            entry = known.get(file["path"])
            oid = None if entry is None else entry.get("lfs", entry)["oid"]
            mode = "lfs" if _is_large(file["path"], file["size"]) else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def lfs_batch(self, repo_id: str) -> None:
        self._writable(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{repo_id}/{wanted['oid']}"}
            verify = {"href": f"{self.hub.url}/lfs-verify/{repo_id}"}
            known = (self.hub.objects / wanted["oid"]).exists()
            objects.append({**wanted, **({} if known else {"actions": {"upload": upload, "verify": verify}})})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, repo_id: str, oid: str) -> None:
        """Like the object store: it takes what comes, under a signed address and without a token."""
        content = self.body
        if self.fault.kind == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if hashlib.sha256(content).hexdigest() == oid:
            self.hub.keep(content)
        self._answer(b"")

    def lfs_verify(self, repo_id: str) -> None:
        self._writable(repo_id)
        asked = json.loads(self.body)
        path = self.hub.objects / asked["oid"]
        if not path.is_file() or path.stat().st_size != asked["size"]:
            raise HubError(422, f"the object {asked['oid']} did not arrive whole")
        self._json({})

    def commit(self, repo_id: str, branch: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            repository = self._writable(repo_id)
            if branch not in repository.branches:
                raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
            head = repository.branches[branch]
            if header.get("parentCommit") not in (None, head):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            changes = self._changes(lines, repository.files(branch))
            commit = repository.commit(branch, header["summary"], changes, header.get("description", ""))
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _changes(self, lines: list[dict], known: dict[str, Any]) -> dict[str, tuple[Path, bool] | None]:
        changes: dict[str, tuple[Path, bool] | None] = {}
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                continue
            name = value["path"].rstrip("/")
            if name.startswith("/") or ".." in name.split("/"):
                raise HubError(400, f"path {name!r} leads out of the repository")
            if kind == "file":
                content = base64.b64decode(value["content"])
                if _is_large(name, len(content)) and content:
                    raise HubError(400, f"{name} belongs into LFS storage")
                changes[name] = (self.hub.keep(content), False)
            elif kind == "lfsFile":
                if not (self.hub.objects / value["oid"]).is_file():
                    raise HubError(400, f"LFS object {value['oid']} of {name} was not uploaded")
                changes[name] = (self.hub.objects / value["oid"], True)
            elif kind == "deletedFile":
                if name not in known:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                changes[name] = None
            elif kind == "deletedFolder":
                changes |= {path: None for path in known if path.startswith(f"{name}/")}
            else:
                raise HubError(400, f"unknown operation {kind!r}")
        return changes

    def create_tag(self, repo_id: str, revision: str) -> None:
        name = json.loads(self.body)["tag"]
        with self.hub.lock:
            repository = self._writable(repo_id)
            if name in repository.tags:
                raise HubError(409, f"Tag {name} already exists")
            repository.tags[name] = repository.resolve(revision)
            repository.write()
        self._json({})

    def delete_tag(self, repo_id: str, name: str) -> None:
        with self.hub.lock:
            repository = self._writable(repo_id)
            if repository.tags.pop(name, None) is None:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            repository.write()
        self._json({})

    def file(self, repo_id: str, revision: str, name: str) -> None:
        repository = self._readable(repo_id)
        commit = repository.resolve(revision)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        entry = repository.files(commit).get(name)
        if entry is None:
            message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._answer(b"Entry not found", 404, {**headers, **message})
        lfs = entry.get("lfs")
        headers["ETag"] = f'"{(lfs or entry)["oid"]}"'
        if lfs:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(lfs["size"])}
        content = repository.path(commit, name).read_bytes()
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or wanted.groups() == ("", ""):
            return self._answer(content, 200, headers)
        first, last = wanted.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last), len(content) - 1) if first and last else len(content) - 1
        if start > end:
            return self._answer(b"", 416, {**headers, "Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self._answer(content[start : end + 1], 206, headers)

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})


def _owner(repo_id: str) -> str:
    return repo_id.removeprefix("spaces/").split("/")[0]


def _is_large(name: str, size: int) -> bool:
    return size > 0 and (name.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


# A Space is kept, and called here, as `spaces/USER/NAME`.
_NAME = r"[\w.-]+/[\w.-]+"
_REPO = f"((?:spaces/)?{_NAME})"
_API = f"/api/(?:models/|(?=spaces/)){_REPO}"
ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("DELETE", "/api/repos/delete", _Handler.delete_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("GET", f"{_API}(?:/revision/([^/]+))?", _Handler.info),
    ("GET", f"{_API}/refs", _Handler.refs),
    ("GET", f"{_API}/commits/([^/]+)", _Handler.commits),
    ("GET", f"{_API}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    ("POST", f"{_API}/paths-info/([^/]+)", _Handler.paths_info),
    ("POST", f"{_API}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"{_API}/commit/([^/]+)", _Handler.commit),
    ("POST", f"{_API}/tag/([^/]+)", _Handler.create_tag),
    ("DELETE", f"{_API}/tag/([^/]+)", _Handler.delete_tag),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", f"/lfs/{_REPO}/([0-9a-f]+)", _Handler.lfs_upload),
    ("POST", f"/lfs-verify/{_REPO}", _Handler.lfs_verify),
    ("GET HEAD", f"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.file),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    with HubServer(args.folder, args.port) as hub:
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={hub.token} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
