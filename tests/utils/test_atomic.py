"""Files are replaced as a unit."""

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
