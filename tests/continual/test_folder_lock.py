"""A folder is one run's at a time, and nobody's once that run is dead."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hf_zocl.continual.folder_lock import LOCK_FILE, FolderInUseError, FolderLock


HOLD = """
import sys, time
from hf_zocl.continual.folder_lock import FolderLock
with FolderLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_that_is_locked_is_refused_and_left_as_it_is(tmp_path):
    with FolderLock(tmp_path):
        before = (tmp_path / LOCK_FILE).read_text()
        with pytest.raises(FolderInUseError, match=rf"is in use by another run \(process {os.getpid()} on "):
            FolderLock(tmp_path).__enter__()
        assert (tmp_path / LOCK_FILE).read_text() == before
    assert os.listdir(tmp_path) == []
    with FolderLock(tmp_path):
        pass


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_holder_that_is_killed_holds_nothing(tmp_path, holder):
    with pytest.raises(FolderInUseError, match=f"process {holder.pid} "):
        FolderLock(tmp_path).__enter__()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with FolderLock(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / LOCK_FILE).read_text()
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_hold_what_its_parent_has_locked(tmp_path):
    ready, done = os.pipe(), os.pipe()
    with FolderLock(tmp_path):
        child = os.fork()
        if child == 0:  # as a data loader's worker that outlives its parent
            os.write(ready[1], b"x")
            os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    with FolderLock(tmp_path):
        pass
    os.write(done[1], b"x")
    assert os.waitpid(child, 0)[1] == 0


def test_a_folder_that_was_made_for_the_lock_alone_goes_with_it(tmp_path):
    with FolderLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert os.listdir(tmp_path) == []
    with FolderLock(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert os.listdir(tmp_path / "a") == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="another kind of lock")
def test_where_nothing_can_be_locked_there_is_a_warning(tmp_path, monkeypatch, caplog):
    import logging

    from hf_zocl.continual import folder_lock

    def unable(*_):
        raise OSError(95, "Operation not supported")

    logging.getLogger("hf_zocl").propagate = True
    monkeypatch.setattr(folder_lock.fcntl, "flock", unable)
    with FolderLock(tmp_path):
        assert "cannot be locked (Operation not supported)" in caplog.text
    assert not Path(tmp_path / LOCK_FILE).exists()
