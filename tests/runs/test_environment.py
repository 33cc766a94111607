"""The commit that a run records, in a checkout and in an installed copy."""

import json
from types import SimpleNamespace

import pytest

from selfsup_xbn.runs import environment


@pytest.mark.parametrize(
    ("source", "commit"),
    [
        (
            {"url": "https://host/repository", "vcs_info": {"vcs": "git", "commit_id": "0123456789abcdef"}},
            "0123456789ab",
        ),
        ({"url": "file:///folder", "dir_info": {}}, "not recorded"),
        (None, "not recorded"),
    ],
)
def test_installed_copy_has_the_commit_that_pip_recorded(tmp_path, monkeypatch, source, commit):
    text = None if source is None else json.dumps(source)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "selfsup_xbn/runs/environment.py"))
    monkeypatch.setattr(environment, "distribution", lambda name: SimpleNamespace(read_text=lambda file: text))
    assert environment.git_commit() == commit
