"""What is read may come from anyone: no code of it is run, no path leaves the data's folder, no image fills memory."""

import contextlib
import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from experiments.benchmarks.official_layouts import WRITERS
from selfsup_xbn.cli import main
from selfsup_xbn.data import eval_batches, files, load_data
from selfsup_xbn.data.datasets import cifar
from selfsup_xbn.data.files import fit
from selfsup_xbn.errors import UserError
from selfsup_xbn.runs import checkpoint
from tests.command_line import SUPERVISE, image_folder, refused

SMALL = ["--limit-train", "64", "--batch-size", "20", "--queue-size", "20", "--epochs", "1", "--drift-every", "0"]


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def sealed(content: bytes) -> bytes:
    """With the checksum that this program's checkpoints have: anyone can make one."""
    body = content[:-2] if content.startswith(b"PK") else content
    return body + bytes([32, 0]) + hashlib.sha256(body).digest()


def traps(sprung: Path) -> dict[str, bytes]:
    """The trap in every format that ``torch.load`` knows, alone and beside what a checkpoint holds."""
    state = {"method": {}, "config": {}, "trap": Trap(sprung)}
    files: dict[str, bytes] = {"pickle": pickle.dumps(Trap(sprung)), "state": pickle.dumps(state)}
    for name, zipped in (("zip", True), ("legacy", False)):
        buffer = io.BytesIO()
        torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
        files[name] = buffer.getvalue()
    return files | {f"sealed {name}": sealed(content) for name, content in files.items()}


def test_traps_run_when_pickles_are_trusted(tmp_path):
    for name, content in traps(tmp_path / "sprung").items():
        (tmp_path / "sprung").unlink(missing_ok=True)
        (tmp_path / "trap.pt").write_bytes(content)
        assert checkpoint.is_intact(tmp_path / "trap.pt") == name.startswith("sealed"), name
        with contextlib.suppress(Exception):
            torch.load(tmp_path / "trap.pt", weights_only=False)
        assert (tmp_path / "sprung").exists(), name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A supervised run, which has all files that a run can have."""
    folder = tmp_path_factory.mktemp("run")
    assert main([*SUPERVISE, *SMALL, "--images-per-class", "4", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("kind", ["pickle", "state", "zip", "legacy"])
@pytest.mark.parametrize("seal", ["", "sealed "])
def test_pickle_that_would_run_code_is_refused_everywhere(tmp_path, capsys, run, kind, seal):
    content = traps(tmp_path / "sprung")[seal + kind]
    (tmp_path / "other.pt").write_bytes(content)
    weights = ["--weights", str(tmp_path / "other.pt"), "--backbone", "convnet-digits", "--data", "digits"]
    capsys.readouterr()
    refused(capsys, ["evaluate", "knn", *weights])
    for name, command in {
        "checkpoint.pt": ["evaluate", "knn", "--run", str(run)],
        "best.pt": ["evaluate", "knn", "--best", "--run", str(run)],
    }.items():
        whole = (run / name).read_bytes()
        (run / name).write_bytes(content)
        assert name in refused(capsys, command)
        if name == "checkpoint.pt":
            assert name in refused(capsys, ["supervise", "--resume", "--out", str(run)])
        (run / name).write_bytes(whole)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("place", ["batch", "archive"])
def test_unofficial_cifar_files_are_never_unpickled(tmp_path, monkeypatch, place):
    root = tmp_path / "data"
    (root / "cifar-10-batches-py").mkdir(parents=True)
    if place == "batch":
        for name in ("data_batch_1", "test_batch", "batches.meta"):
            (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    else:
        with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
            archive.addfile(tarfile.TarInfo("../../sprung"), io.BytesIO())

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    with pytest.raises(UserError, match=r"is damaged .its checksum differs., and the download failed"):
        cifar.load("cifar10", "", root=str(root))
    assert not (tmp_path / "sprung").exists()


def test_annotation_that_leaves_the_folder_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (9, 9)).save(outside / "secret.jpg")
    for name, file in (("sop", "Ebay_test.txt"), ("inshop", "Eval/list_eval_partition.txt"), ("cub200", "images.txt")):
        root = tmp_path / name
        root.mkdir()
        WRITERS[name](root, 0.002, b"")
        lines = (root / file).read_text().split("\n")
        for escape in (
            f"{outside}/secret.jpg",
            "../outside/secret.jpg",
            "../../outside/secret.jpg",
            "a/../../outside/secret.jpg",
        ):
            column = {"sop": 3, "inshop": 0, "cub200": 1}[name]
            fields = lines[4].split()
            fields[column] = escape
            (root / file).write_text("\n".join([*lines[:4], " ".join(fields), *lines[5:]]))
            with pytest.raises(UserError, match="expected a path inside"):
                load_data(f"{name}:{root}")
    root = tmp_path / "cars196"
    (root / "car_ims").mkdir(parents=True)
    row = np.array([("../outside/secret.jpg", 7)], [("relative_im_path", object), ("class", object)])
    savemat(root / "cars_annos.mat", {"annotations": row})
    with pytest.raises(UserError, match="expected a path inside"):
        load_data(f"cars196:{root}")


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (900, 30), (30, 900)])
def test_only_the_middle_of_a_very_long_image_is_resized(size, monkeypatch):
    resize, areas = files.TF.resize, []
    monkeypatch.setattr(
        files.TF, "resize", lambda image, *args, **kwargs: (areas.append(image.size), resize(image, *args, **kwargs))[1]
    )
    assert fit(Image.new("RGB", size), 32).size == (32, 32)
    assert sorted(areas[0]) == [min(size), 16 * min(size)]


@pytest.mark.parametrize("turn", [0, 1])
def test_long_image_equals_the_middle_of_the_whole_resized(turn):
    image = Image.fromarray(np.rot90(np.random.default_rng(0).integers(0, 256, (16, 600, 3), np.uint8), turn))
    whole = files.TF.resize(image, [32], antialias=True)
    assert np.array_equal(np.asarray(fit(image, 28)), np.asarray(files.TF.center_crop(whole, [28, 28])))


def test_huge_image_in_a_small_file_is_refused(tmp_path):
    root = image_folder(tmp_path / "photos", images=2)
    bomb = root / "train" / "a" / "bomb.png"
    Image.new("L", (1, 65_000)).save(bomb)  # resized to 37 pixels of width: 89 million pixels; to 256: 4 billion
    assert bomb.stat().st_size < 300
    data = load_data(f"folder:{root}", workers=0)
    assert sum(len(batch) for batch in eval_batches(data.train, data, batch_size=2)) == 5
    Image.new("1", (12_000, 12_000)).save(bomb)
    assert bomb.stat().st_size < 30_000
    with pytest.raises(UserError, match=r"bomb.png: (.*got 12000 x 12000|the image is too large)"):
        load_data(f"folder:{root}", workers=0)
