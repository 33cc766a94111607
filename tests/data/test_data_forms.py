"""Data as people have it: folders in several layouts, lists, divisions by class, limits and their description."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from selfsup_xbn.cli import main
from selfsup_xbn.config.modes import PretrainConfig
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.data import data_of, load_data
from selfsup_xbn.data.parts import limit_test, part_lines, unmatched
from selfsup_xbn.errors import UserError
from tests.command_line import refused
from tests.data.test_annotation_faults import edit
from tests.official import official

SMALL = (12, 12)
PHOTOS = replace(RECIPES["photos"], weights="", backbone="convnet4", workers=0)


def config(data, **changes):
    return PretrainConfig(data=str(data), workers=0, **changes)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("part", ["val", "validation"])
def test_validation_folder_becomes_the_validation_split(tree, part):
    root = tree(train={"a": [SMALL] * 2, "b": [SMALL]}, test={"x": [SMALL]}, **{part: {"b": [SMALL] * 3, "v": [SMALL]}})
    data = load_data(f"folder:{root}", workers=0)
    assert data.classes == ["a", "b", "v", "x"]
    assert data.validation.labels.tolist() == [1, 1, 1, 2]
    assert data.test.labels.tolist() == [3]
    with pytest.raises(UserError, match=r"--validation: expected 0, because .* has validation images"):
        data_of(replace(PHOTOS, data=f"folder:{root}", validation="50%"))


def test_validation_folder_without_test_is_the_test_set(tree):
    data = load_data(f"folder:{tree(train={'a': [SMALL]}, val={'a': [SMALL] * 2})}", workers=0)
    assert (len(data.test), data.validation) == (2, None)
    assert "the validation images are the test images" in data.notes[0]


def test_parts_are_found_whatever_their_case(tree):
    root = tree(Train={"a": [SMALL] * 2}, TEST={"x": [SMALL] * 3}, Val={"v": [SMALL]})
    data = load_data(f"folder:{root}", workers=0)
    assert [len(data.train), len(data.test), len(data.validation)] == [2, 3, 1]
    assert data.classes == ["a", "v", "x"]
    (root / "train").mkdir(exist_ok=True)
    if len(list(root.iterdir())) == 4:  # the file system tells case
        with pytest.raises(UserError, match="names differ by more than case, got TEST, Train, Val, train"):
            load_data(f"folder:{root}", workers=0)


def test_query_and_gallery_folders(tree):
    root = tree(train={"a": [SMALL]}, query={"q": [SMALL]}, gallery={"p": [SMALL], "q": [SMALL] * 2})
    data = load_data(f"folder:{root}", workers=0)
    assert data.classes == ["a", "q", "p"]
    assert (data.test.labels.tolist(), data.gallery.labels.tolist()) == ([1], [2, 1, 1])
    assert data.disjoint
    (root / "test").mkdir()
    with pytest.raises(UserError, match="expected one of test and query, got both"):
        load_data(f"folder:{root}", workers=0)


@pytest.mark.parametrize("train", [True, False], ids=["in train", "at the top"])
def test_one_tree_of_classes_is_divided_by_sorted_names(tree, train):
    classes = {name: [SMALL] * (number + 1) for number, name in enumerate("dbace")}
    root = tree(train=classes) if train else tree(**{name: {"": sizes} for name, sizes in classes.items()})
    whole = load_data(f"folder:{root}", workers=0)
    assert (len(whole.train), len(whole.test)) == (15, 0)
    data = data_of(replace(PHOTOS, data=f"folder:{root}", split_classes="50%"))
    assert data.disjoint
    assert [data.classes[label] for label in data.train.labels.unique()] == ["a", "b", "c"]
    assert [data.classes[label] for label in data.test.labels.unique()] == ["d", "e"]
    assert data.test.labels.tolist() == [3, 4, 4, 4, 4, 4]
    with pytest.raises(UserError, match=r"mode supervise requires test images, .* try --split-classes 50%"):
        data_of(replace(PHOTOS, data=f"folder:{root}"))
    with pytest.raises(UserError, match="expected at least 2 training and 2 test classes, got 1 and 4"):
        data_of(config(f"folder:{root}", split_classes="20%"))


def test_division_by_class_needs_classes_and_no_test_images(tree, tmp_path):
    root = tree(train={"a": [SMALL]}, test={"a": [SMALL]})
    with pytest.raises(UserError, match=r"--split-classes: .* has test images already"):
        data_of(config(f"folder:{root}", split_classes="50%"))
    with pytest.raises(UserError, match=r"--split-classes: .* has no classes"):
        data_of(config(f"folder:{root}/train/a", split_classes="50%"))


@pytest.mark.parametrize("folder", ["train/a", "flat"])
def test_images_without_classes_serve_pretraining_only(tree, folder):
    root = tree(train={"a": [SMALL] * 3})
    (root / "flat").mkdir()
    shutil.copytree(root / "train/a", root / "flat/train")
    data = data_of(config(f"folder:{root}/{folder}"))
    assert (len(data.train), len(data.test), data.labelled) == (3, 0, False)
    assert part_lines(data)[0] == "training images    3 without classes"
    with pytest.raises(UserError, match="mode supervise requires classes"):
        data_of(replace(PHOTOS, data=f"folder:{root}/{folder}"))


def test_unused_folders_and_stray_images_are_reported(tree):
    root = tree(train={"a": [SMALL]}, test={"a": [SMALL]}, raw={"x": [SMALL]})
    shutil.copy(root / "train/a/000.png", root / "train/stray.png")
    notes = load_data(f"folder:{root}", workers=0).notes
    assert notes[0] == f"note: not used: raw in {root}"
    assert f"outside of a class folder: 1, such as {root}/train/stray.png" in notes[1]


# ---------------------------------------------------------------- lists


ROWS = [
    ("a/000.png", "x", "train"),
    ("b/000.png", "10", "query"),
    ("b/001.png", "9", "gallery"),
    ("c,d.png", "x", "val"),
]


def write_list(root, rows, header="path,label,split", name="list.csv"):
    separator = "\t" if name.endswith("tsv") else ","
    lines = [separator.join(f'"{v}"' if separator in v else v for v in row) for row in rows]
    (root / name).write_text("\n".join([header.replace(",", separator), *lines]) + "\n")
    return f"list:{root / name}"


@pytest.fixture
def listed(tree):
    root = tree(a={"": [SMALL]}, b={"": [SMALL, SMALL]})
    shutil.copy(root / "a/000.png", root / "c,d.png")
    return root


@pytest.mark.parametrize("name", ["list.csv", "list.tsv"])
def test_list_has_all_parts_with_paths_beside_it(listed, name):
    data = load_data(write_list(listed, ROWS, name=name), workers=0)
    assert data.classes == ["x", "10", "9"]
    assert [split.labels.tolist() for split in (data.train, data.validation, data.test, data.gallery)] == [
        [0],
        [0],
        [1],
        [2],
    ]
    assert torch.equal(data.train.images, data.validation.images)


def test_list_without_splits_or_labels(listed):
    data = load_data(write_list(listed, [(row[1], row[0], "1") for row in ROWS], "Label, path,other"), workers=0)
    assert data.classes == ["9", "10", "x"]  # numbers by value
    assert (data.train.labels.tolist(), len(data.test)) == ([0, 1, 2, 2], 0)
    data = load_data(write_list(listed, [row[:1] for row in ROWS], "path"), workers=0)
    assert (len(data.train), data.labelled) == (4, False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("e.png,x,train", "list.csv:6: image 'e.png' not found"),
        ("b/../a/000.png,x,train", "list.csv:6: image .* is already listed in .*list.csv:2"),
        ("c.png,x", r"list.csv:6: expected 3 fields \(path, label, split\), got 2"),
        ("b/000.png,,train", "list.csv:6: "),
        ("a/001.png,x,tset", "list.csv:6: "),
        ('"a', "list.csv:6: not a line of a CSV file"),
    ],
)
def test_malformed_line_of_a_list_is_named(listed, row, message):
    spec = write_list(listed, ROWS)
    with open(listed / "list.csv", "a") as file:
        file.write(row + "\n")
    with pytest.raises(UserError, match=message):
        load_data(spec, workers=0)


def test_malformed_list_is_refused(listed):
    for text, message in (
        ("image,label\n", "list.csv:1: expected a header with the columns path, label"),
        ("path,label,split\na/000.png,x,test\n", "expected training images in train, got only test"),
        ("path,split\na/000.png,train\nb/000.png,test\n", "expected a label for each image"),
        ("path,split\na/000.png,tran\n", "expected a split out of .*'tran'; did you mean train"),
        ("path,label\na/000.png,\n", "expected a label, got none"),
        ("", "the file is empty; write a header"),
    ):
        (listed / "list.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            load_data(f"list:{listed / 'list.csv'}", workers=0)
    with pytest.raises(UserError, match="got a folder; write folder:"):
        load_data(f"list:{listed}")


def test_cub200_lists_with_commas_and_classes_from_0(tmp_path):
    spec = official("cub200", tmp_path, 0.002)
    expected = load_data(spec)
    labels = tmp_path / "image_class_labels.txt"
    for file in (tmp_path / "images.txt", labels):
        file.write_text(file.read_text().replace(" ", ", "))
    assert load_data(spec).train.paths == expected.train.paths
    rows = [line.split(",") for line in labels.read_text().splitlines()]
    labels.write_text("".join(f"{number},{int(label) - 1}\n" for number, label in rows))
    data = load_data(spec)
    assert data.train.labels.tolist() == expected.train.labels.tolist()
    assert data.classes == expected.classes
    edit(labels, 2, "2,200")
    with pytest.raises(UserError, match="expected a class_id from 0 to 199, got 200"):
        load_data(spec)


# ---------------------------------------------------------------- limits, descriptions and names


def test_limited_test_set_keeps_whole_classes_and_their_gallery(tree):
    sizes = {name: [SMALL] * 3 for name in "pqrs"}
    root = tree(train={"a": [SMALL]}, query=sizes, gallery=sizes)
    data = data_of(config(f"folder:{root}", limit_test=5))
    assert data.test.labels.bincount()[1:].sort().values.tolist()[-2:] == [3, 3]
    assert (len(data.test), data.test.labels.unique().tolist()) == (6, data.gallery.labels.unique().tolist())
    digits = load_data("digits")
    assert len(limit_test(digits, 50, seed=0).test) == 50
    assert limit_test(digits, 5000, seed=0) is digits


@pytest.mark.parametrize(
    ("test", "text"),
    [
        ("xy", "no test class is a training class"),
        ("ab", "all 2 test classes are training classes"),
        ("ax", "warning: 1 of 2 test classes are training classes: k-NN counts the images of the other 1 as wrong"),
    ],
)
def test_parts_are_described_with_their_common_classes(tree, test, text):
    root = tree(train={"a": [SMALL] * 2, "b": [SMALL]}, test={name: [SMALL] for name in test})
    lines = part_lines(load_data(f"folder:{root}", workers=0))
    assert lines[:2] == ["training images    3 of 2 classes", "test images        2 of 2 classes"]
    assert text in lines[2]


def test_queries_without_a_match_are_counted_and_stated(tree):
    root = tree(train={"a": [SMALL] * 2}, test={"x": [SMALL], "y": [SMALL] * 2, "z": [SMALL]})
    data = load_data(f"folder:{root}", workers=0)
    assert unmatched(data.test, None) == 2
    expected = "not counted        2 of 4 queries, which have no image of their class among the test images"
    assert part_lines(data, "retrieval")[-1] == expected
    assert not any("not counted" in line for line in part_lines(data))
    data = replace(data, gallery=data.test.subset(torch.tensor([0])))
    assert unmatched(data.test, data.gallery) == 3
    assert part_lines(data, "retrieval")[-1].endswith("no image of their class in the gallery")


@pytest.mark.parametrize("part", ["test", "validation"])
def test_parts_without_any_match_are_refused_for_retrieval(tree, part):
    classes = {"train": {"a": [SMALL] * 2}, "test": {"x": [SMALL] * 2}} | {part: {"x": [SMALL], "y": [SMALL]}}
    root = tree(**classes)
    with pytest.raises(UserError, match=f"expected at least one {part} image with another image of its class"):
        data_of(replace(PHOTOS, data=f"folder:{root}"))
    assert len(data_of(config(f"folder:{root}")).test) == 2


def test_dry_run_refuses_what_the_run_refuses(tree, capsys):
    root = tree(train={name: [SMALL] * 8 for name in "abcde"}, test={"x": [SMALL] * 2})
    command = ["supervise", "--data", f"folder:{root}", "--weights=", "--backbone", "convnet4", "--dry-run"]
    message = refused(capsys, command)
    assert "--batch-size 32 with --images-per-class 4 needs 8 classes, but the data set has 5: " in message
    assert message.endswith("use --batch-size 20, or --images-per-class 8\n")
    for remedy in (["--batch-size", "20"], ["--images-per-class", "8"]):
        assert main([*command, *remedy]) == 0
    capsys.readouterr()


def test_error_of_a_size_repeats_what_was_skipped(tree, capsys):
    root = tree(train={"a": [SMALL] * 3})
    shutil.copy(root / "train/a/000.png", root / "train/stray.png")
    message = refused(capsys, ["pretrain", "--data", f"folder:{root}", "--backbone", "convnet4", "--dry-run"])
    assert "the number of training images, 3, got 64 (warning: skipped, because outside of a class folder: 1" in message


def test_lists_are_answered_with_the_remedy(tree, tmp_path, capsys):
    image = tree(train={"a": [SMALL]}) / "train/a/000.png"
    for header, rows, remedy in (
        ("path;label", "", "separate them by commas or tabs"),
        ("", "path,label", "expected a header with the columns path, label and, if wanted, split, each once, got ''"),
        ("path,label", "", "expected a line per image below the header, got none"),
        ("path", str(image), "requires classes, list:{} has none: add a column label"),
    ):
        (tmp_path / "list.csv").write_text(f"{header}\n{rows}")
        command = ["supervise", "--data", f"list:{tmp_path}/list.csv", "--weights=", "--backbone", "convnet4"]
        assert remedy.format(tmp_path / "list.csv") in refused(capsys, [*command, "--dry-run"])
    message = refused(capsys, ["pretrain", "--data", f"folder:{tmp_path}/list.csv", "--dry-run"])
    assert f"write list:{tmp_path}/list.csv" in message


@pytest.mark.parametrize(("share", "spelling"), [("50", "50%"), ("0.25", "25%")])
def test_share_without_percent_is_answered_with_the_spelling(capsys, share, spelling):
    assert f"got '{share}'; write {spelling}\n" in refused(capsys, ["supervise", "--split-classes", share])


def test_paths_without_a_prefix_are_answered_with_the_spelling(tmp_path, capsys):
    (tmp_path / "list.csv").write_text("path\n")
    for spec, spelling in (
        (str(tmp_path), f"write folder:{tmp_path}"),
        (f"{tmp_path}/list.csv", f"write list:{tmp_path}/list.csv"),
        ("csv:my.csv", "write list:my.csv"),
        ("./nowhere", "write folder:./nowhere"),
    ):
        assert spelling in refused(capsys, ["pretrain", "--data", spec, "--dry-run"])
    assert "did you mean timm:vit_tiny" in refused(capsys, ["pretrain", "--backbone", "vit_tiny_patch16_224"])
