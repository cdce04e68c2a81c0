import os

import pytest

from hf_zocl.files import written_whole


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
