from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from experiments.benchmarks.official_layouts import WRITERS, write_images
from selfsup_xbn.data import load_data
from selfsup_xbn.data.datasets import cars196
from selfsup_xbn.errors import UserError
from tests.official import drawing, edit, fault, line_of, official


def test_folder_that_is_not_there_is_named_with_the_cure(tmp_path):
    for name in WRITERS:
        assert fault(f"{name}:{tmp_path}/no").startswith(f"{tmp_path}/no is not a folder; unpack {name} there")
        with pytest.raises(UserError, match=f"{tmp_path}/{name} is not a folder"):
            load_data(name, root=str(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "9 2 3",
            "expected the columns 'image_id class_id super_class_id path' with integers in the first 3, got '9 2 3'",
        ),
        ("9 2 3 a.JPG b.JPG", "got '9 2 3 a.JPG b.JPG'"),
        ("9 two 3 a.JPG", "got '9 two 3 a.JPG'"),
        ("9 -2 3 a.JPG", "got '9 -2 3 a.JPG'"),
        ("9 ٣ 3 a.JPG", "got '9 ٣ 3 a.JPG'"),
        (f"9 {'7' * 5000} 3 a.JPG", "got '9 7777"),
        ("", "got ''"),
        (b"9 2 3 \xff.JPG", "expected UTF-8 text, got byte 0xff"),
        ("9 2 3 /etc/passwd", ", got '/etc/'"),
        ("9 2 3 /passwd", ", got '/'"),
        ("9 2 3 a/../../b.JPG", ", got 'a/../../'"),
        ("9 2 3 ../b.JPG", ", got '../'"),
        ("9 2 3 C:/b.JPG", ", got 'C:/'"),
        (r"9 2 3 ..\x/b.JPG", "expected a path inside "),
        ("9 2 3 ..", "image '..' not found in"),
        ("9 2 3 kind2_final/none.JPG", "image 'kind2_final/none.JPG' not found in"),
        ("9 2 3 nowhere/1.JPG", "image 'nowhere/1.JPG' not found"),
        ("9 2 3 a\0b.JPG", r"image 'a\x00b.JPG' not found"),
        ("9 2 3 a\0b/c.JPG", r"image 'a\x00b/c.JPG' not found"),
    ],
)
def test_malformed_sop_line_is_named_with_the_expected_form(tmp_path, line, message):
    spec = official("sop", tmp_path, 0.0005)
    where = edit(tmp_path / "Ebay_test.txt", 5, line)
    refusal = fault(spec)
    assert refusal.startswith(f"{where}: ")
    assert message in refusal
    assert len(refusal) < 500


@pytest.mark.parametrize(("first", "second"), [("train", "train"), ("train", "test"), ("test", "test")])
def test_image_named_twice_is_refused_with_both_lines(tmp_path, first, second):
    spec = official("sop", tmp_path, 0.0005)
    one, other = (tmp_path / f"Ebay_{part}.txt" for part in (first, second))
    where = edit(other, 7, line_of(one, 4))
    assert fault(spec).startswith(f"{where}: image ")
    assert fault(spec).endswith(f" is already listed in {one}:4; remove one of the two")


def test_list_of_sop_without_header_rows_or_content_is_refused(tmp_path):
    spec, file = official("sop", tmp_path, 0.0005), tmp_path / "Ebay_train.txt"
    header, rest = file.read_text().split("\n", 1)
    file.write_text(rest)
    assert fault(spec).startswith(f"{file}:1: expected the header 'image_id class_id super_class_id path', got '1")
    file.write_text(header + "\n")
    assert fault(spec).startswith(f"{file}:2: expected rows of 'image_id class_id super_class_id path'")
    file.write_text("\n \n")
    assert fault(spec).startswith(f"{file}:1: the file is empty")
    file.unlink()
    assert fault(spec).startswith("Ebay_train.txt not found in ")


def test_windows_line_ends_and_trailing_blanks_change_nothing(tmp_path):
    spec, file = official("sop", tmp_path, 0.0005), tmp_path / "Ebay_train.txt"
    before = load_data(spec).train
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert load_data(spec).train.paths == before.paths


def test_test_class_of_sop_that_is_a_training_class_is_refused(tmp_path):
    spec, file = official("sop", tmp_path, 0.0005), tmp_path / "Ebay_test.txt"
    number, _, *rest = line_of(file, 6).split()
    where = edit(file, 6, " ".join([number, "1", *rest]))
    assert fault(spec).startswith(f"{where}: expected a class that the training set does not contain, got 1")


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (1, "12", "expected 53, the number of rows, got '12'"),
        (1, "many", "the number of rows, got 'many'"),
        (
            2,
            "image_name item_id",
            "expected the header 'image_name item_id evaluation_status', got 'image_name item_id'",
        ),
        (
            4,
            "img/x.jpg id_1 validation",
            "expected evaluation_status to be one of train, query, gallery, got 'validation'",
        ),
        (4, "img/x.jpg id_1", "expected the columns 'image_name item_id evaluation_status', got 'img/x.jpg id_1'"),
        (4, "/img/x.jpg id_1 train", ", got '/img/'"),
        (4, "img/x.jpg id_1 train", "image 'img/x.jpg' not found in"),
    ],
)
def test_malformed_inshop_line_is_named_with_the_expected_form(tmp_path, number, line, message):
    spec = official("inshop", tmp_path, 0.001)
    where = edit(tmp_path / "Eval" / "list_eval_partition.txt", number, line)
    refusal = fault(spec)
    assert refusal.startswith(f"{where}: ")
    assert message in refusal


def test_inshop_without_gallery_or_with_shared_items_is_refused(tmp_path):
    spec, file = official("inshop", tmp_path, 0.001), tmp_path / "Eval" / "list_eval_partition.txt"
    text = file.read_text()
    file.write_text(text.replace("gallery\n", "query\n"))
    assert "expected at least one gallery image in the annotations, got none" in fault(spec)
    file.write_text(text)
    image, _, status = line_of(file, 40).split()
    assert status == "query"
    where = edit(file, 40, f"{image} id_00000001 {status}")
    assert fault(spec).startswith(f"{where}: expected a class that the training set does not contain, got id_00000001")


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("image_class_labels.txt", "3 201", "expected a class_id from 1 to 200, got 201"),
        ("image_class_labels.txt", "3 0", "expected a class_id from 1 to 200, got 0"),
        (
            "image_class_labels.txt",
            "3",
            "expected the columns 'image_id class_id' with integers in the first 2, got '3'",
        ),
        ("image_class_labels.txt", "2 5", "image_class_labels.txt:2; remove one of the two"),
        ("images.txt", "3 none.jpg", "image 'none.jpg' not found in"),
        ("images.txt", "2 none.jpg", "images.txt:2; remove one of the two"),
    ],
)
def test_malformed_cub200_line_is_named_with_the_expected_form(tmp_path, name, line, message):
    spec = official("cub200", tmp_path, 0.002)
    where = edit(tmp_path / name, 3, line)
    refusal = fault(spec)
    assert refusal.startswith(f"{where}: ")
    assert message in refusal


def test_lists_of_cub200_must_name_the_same_images(tmp_path):
    spec, images, labels = (
        official("cub200", tmp_path, 0.002),
        tmp_path / "images.txt",
        tmp_path / "image_class_labels.txt",
    )
    text = labels.read_text()
    labels.write_text(text + "99 5\n")
    assert fault(spec).startswith(f"{labels}:25: image_id 99 is missing from {images}; add it there")
    labels.write_text(text.partition("\n")[2])
    assert fault(spec).startswith(f"{images}:1: image_id 1 is missing from {labels}; add it there")
    labels.unlink()
    assert fault(spec).startswith(f"{labels} is missing; unpack the official archive again")


def test_annotations_of_cars196_that_make_no_sense_are_refused(tmp_path):
    spec, file = f"cars196:{tmp_path}", tmp_path / "cars_annos.mat"
    assert ": expected cars_annos.mat, devkit/cars_train_annos.mat or train/CLASS/, got none" in fault(spec)
    write_images([tmp_path / "car_ims" / "1.jpg"], b"")
    expected = "expected relative_im_path to be a string and class an integer from 1 to 196, got "
    for row, message in (
        (("car_ims/1.jpg", 197), f"{expected}'car_ims/1.jpg' and 197"),
        (("car_ims/1.jpg", "x"), f"{expected}'car_ims/1.jpg' and 'x'"),
        ((7, 7), f"{expected}7 and 7"),
        (("car_ims/2.jpg", 7), "image 'car_ims/2.jpg' not found in "),
        (("../1.jpg", 7), f"expected a path inside {tmp_path}, got '../'"),
    ):
        savemat(file, {"annotations": np.array([row], [("relative_im_path", object), ("class", object)])})
        assert fault(spec).startswith(f"{file}: annotation 1: {message}")
    savemat(file, {"annotations": np.arange(3)})
    assert fault(spec).startswith(f"{file}: annotation 1: {expected}None and None")


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0 MAT-file" + bytes(300), b"annotations"])
def test_file_of_cars196_that_is_no_matlab_file_is_refused(tmp_path, content):
    (tmp_path / "cars_annos.mat").write_bytes(content)
    assert fault(f"cars196:{tmp_path}").startswith(f"{tmp_path}/cars_annos.mat: not a MATLAB file with annotations")


def test_faults_of_omniglot_name_the_folder_or_the_file(tmp_path):
    spec = f"omniglot:{tmp_path}"
    for place in ("train/c1", "train/c2", "test/c2"):
        (tmp_path / place).mkdir(parents=True)
        drawing(0).save(tmp_path / place / "0.png")
    assert fault(spec).startswith(f"{tmp_path}: c2 is in both the training set and the test set")
    (tmp_path / "test/c2").rename(tmp_path / "test/c3")
    (tmp_path / "train/c2/0.png").write_bytes(b"\x89PNG")
    assert fault(spec).startswith(f"{tmp_path}/train/c2/0.png: not a readable image")
    (tmp_path / "images_background/A/c1").mkdir(parents=True)
    drawing(0).save(tmp_path / "images_background/A/c1/0.png")
    assert fault(spec).startswith(f"{tmp_path}/images_evaluation is not a folder")


FILES = {"sop": "Ebay_test.txt", "inshop": "Eval/list_eval_partition.txt", "cub200": "image_class_labels.txt"}
TOKENS = (
    "",
    "-1",
    "0",
    "1e3",
    "201",
    "9" * 30,
    "/",
    "..",
    "../x",
    "a//b",
    "\\",
    "query",
    "id_1",
    "\0",
    "\x85",
    "é",
    "\r",
)


@pytest.fixture(scope="module", params=list(FILES))
def intact(request, tmp_path_factory) -> tuple[str, Path, bytes]:
    """A small data set, one of its lists, and what the list holds."""
    root = tmp_path_factory.mktemp("data")
    file = root / FILES[request.param]
    return official(request.param, root, 0.0005), file, file.read_bytes()


@settings(max_examples=50)
@given(seed=st.randoms(use_true_random=False), edits=st.integers(1, 4), noise=st.binary(max_size=4))
def test_mutated_list_is_read_or_refused_by_line(intact, seed, edits, noise):
    spec, file, content = intact
    lines = content.split(b"\n")
    for _ in range(edits):
        mutate(lines, seed, noise)
    file.write_bytes(b"\n".join(lines))
    try:
        refusal = ""
        data = load_data(spec)
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal
    # The other list of a pair may be the one that a line is missing from.
    assert f"{file.parent}" in refusal if refusal else len(data.test) > 0


def mutate(lines: list[bytes], seed: random.Random, noise: bytes) -> None:
    number, kind = seed.randrange(len(lines)), seed.randrange(4)
    fields = lines[number].split()
    if kind == 0:
        lines.insert(seed.randrange(len(lines)), lines[number])
    elif kind == 1 and len(lines) > 1:
        del lines[number]
    elif kind == 2 and fields:
        fields[seed.randrange(len(fields))] = seed.choice(TOKENS).encode()
        lines[number] = b" ".join(fields)
    else:
        place = seed.randrange(len(lines[number]) + 1)
        lines[number] = lines[number][:place] + noise + lines[number][place + 1 :]


def test_crash_of_the_matlab_reader_is_an_error_of_one_line(tmp_path, monkeypatch):
    spec = official("cars196", tmp_path, 0.002)
    monkeypatch.setattr(cars196, "loadmat", lambda *_, **__: os._exit(7))
    assert fault(spec).startswith(f"{tmp_path}/cars_annos.mat: not a MATLAB file with annotations ('A process ")
