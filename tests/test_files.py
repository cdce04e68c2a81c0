import os

import pytest

from hf_zocl.files import remove_unfinished, replace_folder, written_whole


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
