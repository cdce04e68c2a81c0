import errno
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hf_zocl.files import remove_unfinished, replace_folder, room_error, written_whole


def test_what_was_there_stays_until_the_block_ends(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with written_whole(file) as unfinished:
        unfinished.write_text("ne")
        assert file.read_text() == "old"
        unfinished.write_text("new")
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(OSError, match="disk"), written_whole(file) as unfinished:
        unfinished.write_text("ne")
        raise OSError("disk")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_takes_the_place_of_another_and_what_a_killed_process_left_is_removed(tmp_path):
    for name, text in (("old", "old"), (".new.tmp", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    replace_folder(tmp_path / ".new.tmp", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "new"
    (tmp_path / ".results.json.7.tmp").write_text("{")
    (tmp_path / ".task-02.tmp").mkdir()
    (tmp_path / ".keep.tmp").write_text("the user's")
    (tmp_path / ".notes.7.tmp").write_text("the user's")
    remove_unfinished(tmp_path, {"results.json"})
    assert sorted(os.listdir(tmp_path)) == [".keep.tmp", ".notes.7.tmp", ".task-02.tmp", "old"]


def test_an_error_without_a_number_is_for_want_of_room_only_where_there_is_none(tmp_path, monkeypatch):
    error = RuntimeError("No space left on device (os error 28)")
    assert room_error(tmp_path / "not" / "there", error) is None
    assert room_error(tmp_path, OSError(errno.EACCES, "")) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert room_error(tmp_path / "not" / "there", RuntimeError("anything")).errno == errno.ENOSPC
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 << 20))
    assert room_error(tmp_path, RuntimeError("anything")) is None
    assert room_error(tmp_path, RuntimeError("anything"), needed=3 << 20).errno == errno.ENOSPC
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    file = tmp_path / "file"
    with pytest.raises(OSError, match="No space left") as raised, written_whole(file):
        raise RuntimeError("anything")
    assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from hf_zocl.files import room_error
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (torch.save, save_file):
    tensor, file = torch.ones(100_000), Path(sys.argv[1]) / write.__name__
    try:
        write({"a": tensor}, file)
    except Exception as error:
        print(room_error(file.parent, error, tensor.nbytes))
    file.unlink(missing_ok=True)
print(room_error(Path(sys.argv[1]), RuntimeError("anything"), 50_000))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits")
def test_a_file_that_may_not_grow_is_known_without_a_number(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}"] * 2 + ["None"]
