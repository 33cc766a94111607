"""The page: one file that needs nothing else, whose numbers are the runs', and in which nothing of theirs is markup."""

import base64
import html
import io
import json
import re
import shlex
import shutil
from collections import Counter
from html.parser import HTMLParser

import pytest
from PIL import Image

from selfsup_xbn.cli import main
from selfsup_xbn.config.command import command_of
from selfsup_xbn.config.saved import from_resolved
from selfsup_xbn.report.thumbnails import draw_pictures
from selfsup_xbn.runs.folder import read_metrics
from tests.command_line import PRETRAIN, SUPERVISE, image_folder, refused
from tests.fixtures import without_checks

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags with their attributes, and the text, of a page that is well-formed."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.texts, self._open = [], [], []
        self.feed(self.source)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data.strip()))

    def all(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [found for name, found in self.tags if name == tag and wanted.items() <= found.items()]

    def text_in(self, tag):
        return [text for inside, text in self.texts if inside == tag and text]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two pretrained runs and a supervised one, all small."""
    root = tmp_path_factory.mktemp("runs")
    small = ["--limit-train", "128", "--batch-size", "64", "--queue-size", "64", "--epochs", "2", "--drift-every", "1"]
    with without_checks():
        for name in ("xbm", "axbn"):
            assert main([*PRETRAIN, *small, "--adaptation", name, "--out", str(root / name)]) == 0
        small[3], small[7] = "60", "1"
        assert main([*SUPERVISE, *small, "--out", str(root / "supervised")]) == 0
    return root


@pytest.fixture(scope="module")
def page(runs):
    folders = [str(runs / name) for name in ("xbm", "axbn", "supervised")]
    assert main(["report", *folders, "--out", str(runs / "page")]) == 0
    return Page(runs / "page" / "index.html")


def test_page_is_one_file_without_scripts_or_requests(page, runs):
    assert page.source.startswith("<!doctype html>")
    assert [path.name for path in (runs / "page").iterdir()] == ["index.html"]
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    links = [value for _, found in page.tags for name, value in found.items() if name in ("src", "href", "xlink:href")]
    assert links
    assert all(link.startswith("data:image/") for link in links)
    assert "http" not in re.sub(r"http-equiv", "", page.source)
    assert not re.search(r"url\(|@import", page.source)


def test_results_are_the_last_ones_logged(page, runs):
    cells = page.text_in("td")
    for name, keys in {"xbm": ("knn_top1", "knn_top1_backbone"), "supervised": ("recall@1", "map@r")}.items():
        records = read_metrics(runs / name)
        for key in keys:
            assert f"{records[-1][key]:.2f}" in cells
            assert f"{records[0][key + '_untrained']:.2f}" in cells


def test_differing_settings_are_marked_and_come_first(page):
    before, after = page.source.split("<details>")
    assert "temperature" not in before.split("<h2>Settings</h2>")[1]
    assert "temperature" in after.split("</details>")[0]
    marks = Counter(page.text_in("mark"))
    assert marks["axbn"] == 2  # among the differences, and among all
    assert marks["supervise"] == 2
    assert "pretrain" not in marks


def test_each_run_has_a_curve_and_shared_baselines_one_line(page):
    figures = re.findall(r'<figure class="plot">.*?</figure>', page.source, re.DOTALL)
    titles = [re.search("<figcaption>(.*?)</figcaption>", figure)[1] for figure in figures]
    drawn = dict(zip(titles, (re.findall(r'<g class="(\w+)">', figure) for figure in figures), strict=True))
    assert Counter(drawn["loss"]) == {"run0": 1, "run1": 1, "run2": 1}
    assert Counter(drawn["k-NN top-1 [%]"]) == {"run0": 2, "run1": 2, "all": 3}
    assert Counter(drawn["Recall@1 [%]"]) == {"run2": 5}  # trained, untrained (both: embedding, backbone), pixels
    assert Counter(drawn["Kalman gain"]) == {"run1": 1}


def test_every_run_has_a_gallery_and_a_map_of_its_images(page):
    assert len(page.all("table", class_="gallery")) == 3
    assert len(page.all("img", class_="query")) == 30
    assert len(page.all("img", class_="right")) + len(page.all("img", class_="wrong")) == 150
    dots = [found["href"] for found in page.all("image")]
    assert len(dots) == 2 * 250 + 125  # 25 of each class; five classes are unseen digits
    assert Counter(dots[:250]) == Counter(dots[250:500])
    shown = Image.open(io.BytesIO(base64.b64decode(dots[0].partition(",")[2])))
    assert shown.size == (8, 8)


def test_commands_make_the_same_runs(page, runs):
    commands = [html.unescape(re.sub("<.*?>", "", text)) for text in re.findall("<pre>(.*?)</pre>", page.source)]
    for name, command in zip(("xbm", "axbn", "supervised"), commands, strict=False):
        assert shlex.split(command) == command_of(from_resolved(json.loads((runs / name / "config.json").read_text())))
    assert commands[3].startswith("selfsup-xbn report ")
    versions = json.loads((runs / "xbm" / "config.json").read_text())["environment"]
    assert set(versions.values()) <= set(page.text_in("td"))


def test_pictures_do_not_depend_on_the_other_runs(page, runs, capsys):
    assert main(["report", str(runs / "xbm"), "--out", str(runs / "alone")]) == 0
    assert capsys.readouterr().out.split() == [str(runs / "alone" / "index.html")]
    alone = Page(runs / "alone" / "index.html")
    figures, few = (re.findall("<figure>.*?</figure>", found.source, re.DOTALL) for found in (page, alone))
    assert few == [figures[0], figures[3]]  # gallery and map of the first of three


def test_a_replaced_page_is_named(runs, tmp_path, capsys):
    argv, notes = ["report", str(runs / "xbm"), "--out", str(tmp_path / "page")], []
    for _ in range(2):
        assert main(argv) == 0
        notes.append(capsys.readouterr().out.splitlines()[:-1])
    assert notes == [[], ["replaced the page of an earlier report:"]]


def test_runs_on_a_data_set_show_the_same_queries(runs, tmp_path, monkeypatch):
    chosen = []

    def drawn(run, data, queries):
        chosen.append(queries)
        return draw_pictures(run, data, [7, 5, 3] if queries is None else queries)

    monkeypatch.setattr("selfsup_xbn.report.page.draw_pictures", drawn)
    folders = [str(runs / name) for name in ("xbm", "supervised", "axbn")]
    assert main(["report", *folders, "--out", str(tmp_path)]) == 0
    assert chosen == [None, None, [7, 5, 3]]
    galleries = re.findall(r'<table class="gallery">.*?</table>', (tmp_path / "index.html").read_text(), re.DOTALL)
    queries = [re.findall(r'class="query" src="([^"]*)"', gallery) for gallery in galleries]
    assert len(queries[0]) == 3
    assert queries[0] == queries[2] != queries[1]


def test_results_have_a_column_for_each_run(page):
    table = page.source.partition("<h2>Results</h2>")[2].partition("</table>")[0]
    assert [name.strip() for name in re.findall(r"</span>(\w+)</th>", table)] == ["xbm", "axbn", "supervised"]
    row = re.search(r'>Recall@1</th></tr>\s*<tr><th scope="row">raw pixels</th>(.*?)</tr>', table)[1]
    assert [value == "–" for value in re.findall("<td[^>]*>(.*?)</td>", row)] == [True, True, False]


def test_names_are_text_and_never_markup(tmp_path, maps):
    bad = '<svg onload=alert(1)>&"'
    photos = image_folder(tmp_path / f"photos{bad}", classes=(bad, "b"), images=4)
    options = ["--batch-size", "4", "--queue-size", "8", "--epochs", "1", "--image-size", "8", "--knn-k", "3"]
    options += ["--backbone", "convnet-digits", "--weights="]
    folder = tmp_path / f"<img src=x>{bad}"
    assert main(["pretrain", "--data", f"folder:{photos}", *options, "--out", str(folder)]) == 0
    assert main(["report", str(folder), "--out", str(tmp_path / "page")]) == 0
    page = Page(tmp_path / "page" / "index.html")
    assert not [found for _, found in page.tags if "onload" in found or found.get("src") == "x"]
    assert bad in page.text_in("title") + [found["title"] for found in page.all("img")]
    assert any(bad in text for text in page.text_in("h1"))
    assert any(bad in text for text in page.text_in("span"))


def test_run_without_pictures_has_curves_and_a_reason(runs, tmp_path, capsys):
    reasons = {"lost": "checkpoint.pt", "damaged": "checkpoint.pt", "moved": "/gone"}
    for name in reasons:
        shutil.copytree(runs / "xbm", tmp_path / name)
    for path in tmp_path.glob("*/checkpoint-*.pt"):
        path.unlink()
    (tmp_path / "lost" / "checkpoint.pt").unlink()
    (tmp_path / "damaged" / "checkpoint.pt").write_bytes(b"PK\x03\x04")
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config | {"data": "folder:/gone"}))
    capsys.readouterr()
    folders = [str(tmp_path / name) for name in reasons]
    assert main(["report", *folders, str(runs / "axbn"), "--out", str(tmp_path / "page")]) == 0
    *notes, _ = capsys.readouterr().out.splitlines()
    page = Page(tmp_path / "page" / "index.html")
    text = " ".join(text for _, text in page.texts)
    for note, (name, reason) in zip(notes, reasons.items(), strict=True):
        assert note.startswith(f"{name}: no pictures (")
        assert reason in note
        assert note.removeprefix(f"{name}: ") in text
    assert len(page.all("table", class_="gallery")) == 1
    assert len(page.all("g", class_="run2")) == 7  # loss, two of k-NN, two of drift, two of moments


def test_run_stopped_before_its_first_epoch_has_a_page(runs, tmp_path):
    shutil.copytree(runs / "xbm", tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint*.pt"):
        path.unlink()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page")]) == 0
    assert "No metrics have been logged" in Page(tmp_path / "page" / "index.html").source


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("config.json", None, "has a checkpoint, but its config.json is missing"),
        ("config.json", "{", "config.json"),
        ("config.json", "[]", "config.json"),
        ("metrics.jsonl", None, "metrics.jsonl"),
        ("metrics.jsonl", '{"epoch": 0}\n{"epo', "line 2"),
        ("metrics.jsonl", '{"epoch": 0}\n3\n', "line 2"),
        ("metrics.jsonl", '{"loss": 0}\n', "line 1"),
        ("metrics.jsonl", '{"epoch": "one"}\n', "line 1"),
        ("metrics.jsonl", '{"epoch": 0}\n{"epoch": 1, "knn_top1": "a"}\n', "line 2"),
    ],
)
def test_damage_is_one_line_and_nothing_is_written(runs, tmp_path, capsys, name, content, part):
    shutil.copytree(runs / "xbm", tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    if content is not None:
        (tmp_path / "run" / name).write_text(content)
    message = refused(capsys, ["report", str(tmp_path / "run"), "--out", str(tmp_path / "page")])
    assert part in message
    assert not (tmp_path / "page").exists()


def test_files_of_something_else_are_kept(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    assert "is a file" in refused(capsys, ["report", str(runs / "xbm"), "--out", str(tmp_path / "file")])
    (tmp_path / "index.html").write_text("<p>precious")
    assert "not a page of this program" in refused(capsys, ["report", str(runs / "xbm"), "--out", str(tmp_path)])
    assert {path.read_text() for path in tmp_path.iterdir()} == {"precious", "<p>precious"}


def test_missing_values_in_the_log_are_passed_over(runs, tmp_path):
    shutil.copytree(runs / "xbm", tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint*.pt"):
        path.unlink()
    lines = [
        '{"epoch": 0}',
        '{"epoch": 1, "loss": null, "knn_top1": null}',
        '{"epoch": 2, "loss": 3}',
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines))
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page")]) == 0
    page = Page(tmp_path / "page" / "index.html")
    assert len(page.all("figure", class_="plot")) == 1
    assert len(page.all("circle")) == 1


def test_runs_of_one_name_show_their_parents_once_each(runs, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(runs / "xbm", tmp_path / place / "run")
        (tmp_path / place / "run" / "checkpoint.pt").unlink()
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / ".." / "a" / "run"]
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "page")]) == 0
    assert Page(tmp_path / "page" / "index.html").text_in("title")[0] == "a/run, b/run"
