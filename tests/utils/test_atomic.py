"""Files are replaced as a unit."""

import os

import pytest

from selfsup_xbn.errors import UserError
from selfsup_xbn.utils import atomic


def test_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    (tmp_path / "config.json").write_text("old")

    def fill_the_disk():
        with atomic.replacing(tmp_path / "config.json") as file:
            file.write(b"ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"^cannot write \S*config.json \(No space left on device\): .*--resume$"):
        fill_the_disk()
    assert (tmp_path / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_link_in_the_place_of_the_temporary_file_is_replaced(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "config.json.tmp").symlink_to("victim")
    with atomic.replacing(tmp_path / "config.json") as file:
        file.write(b"new")
        assert not (tmp_path / "config.json.tmp").is_symlink()
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "config.json").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_log_is_appended_to_regular_files_only(tmp_path, kind):
    (tmp_path / "victim").write_text("precious")
    make = {"link": lambda path: path.symlink_to("victim"), "fifo": os.mkfifo}[kind]
    make(tmp_path / "log")
    with pytest.raises(OSError, match=r"symbolic links|No such device or address|not a regular file"):
        atomic.open_to_append(tmp_path / "log")
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("folder", [".", "new", "new/er"])
def test_a_folder_that_can_be_created_is_not_created(tmp_path, folder):
    atomic.check_creatable(tmp_path / folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["file/new", "x" * 300, "new/" + "x" * 300])
def test_a_folder_that_cannot_be_created_is_named(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^cannot write {tmp_path}/{folder} .*: choose another --out$"):
        atomic.check_creatable(tmp_path / folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
