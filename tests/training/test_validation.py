"""The best model is chosen on held-out training classes, which then do not train."""

import shutil
from dataclasses import replace

import pytest
import torch

from selfsup_xbn.cli import main
from selfsup_xbn.config.modes import SuperviseConfig
from selfsup_xbn.config.saved import from_resolved
from selfsup_xbn.config.schema import resolved
from selfsup_xbn.data import data_of
from selfsup_xbn.errors import UserError
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_metrics
from selfsup_xbn.training.trainer import Run
from tests.command_line import SUPERVISE, image_folder

HALF = SuperviseConfig(validation="40%", batch_size=12, images_per_class=4, seed=3)
OPTIONS = [*SUPERVISE, "--validation", "40%", "--batch-size", "12", "--images-per-class", "4", "--epochs", "3"]
OPTIONS += ["--limit-train", "150", "--limit-test", "100"]


def test_validation_classes_follow_the_seed_and_do_not_train():
    whole, data = data_of(replace(HALF, validation="0")), data_of(HALF)
    trained, held_out = set(data.train.labels.tolist()), set(data.validation.labels.tolist())
    assert len(held_out) == 2
    assert trained | held_out == set(whole.train.labels.tolist())
    assert not trained & held_out
    assert len(data.train) + len(data.validation) == len(whole.train)
    assert whole.validation is None
    assert torch.equal(data_of(HALF).train.labels, data.train.labels)
    draws = {tuple(data_of(replace(HALF, seed=seed)).validation.labels.unique().tolist()) for seed in range(5)}
    assert len(draws) > 1


@pytest.mark.slow
def test_the_best_model_is_the_best_on_held_out_classes(tmp_path, monkeypatch):
    values = iter([10.0, 50.0, 90.0, 30.0])
    trained = set()
    step = Run.train_step

    def noted(run, batch):
        trained.update(batch.labels.tolist())
        step(run, batch)

    monkeypatch.setattr(Run, "train_step", noted)
    monkeypatch.setattr(Run, "_validate", lambda run: {"recall@1_validation": next(values)})
    assert main([*OPTIONS, "--out", str(tmp_path)]) == 0
    records = read_metrics(tmp_path)
    assert [record["recall@1_validation"] for record in records] == [10.0, 50.0, 90.0, 30.0]
    assert checkpoint.load(tmp_path, checkpoint.BEST)["epoch"] == 2
    assert len(trained) == 3


def test_other_values_of_k_are_shown_and_the_best_model_is_chosen_all_the_same(tmp_path, capsys):
    assert main([*OPTIONS, "--epochs", "1", "--recall-ks", "3,10", "--out", str(tmp_path)]) == 0
    header, last = read_metrics(tmp_path)[0], read_metrics(tmp_path)[-1]
    assert {"recall@1", "recall@3", "recall@10"} <= last.keys()
    assert header["recall@3_raw_pixels"] >= header["recall@1_raw_pixels"]
    assert (tmp_path / checkpoint.BEST).exists()
    out = capsys.readouterr().out
    assert "Recall@3" in out
    assert f"{last['recall@3']:.2f}" in out


@pytest.mark.slow
def test_pretraining_keeps_the_best_model_if_there_are_validation_images(tmp_path, monkeypatch, capsys):
    photos = image_folder(tmp_path / "photos", images=4)
    shutil.copytree(photos / "test", photos / "val")
    values = iter([10.0, 50.0, 90.0, 30.0])
    monkeypatch.setattr(Run, "_validate", lambda run: {"knn_top1_validation": next(values)})
    options = ["--data", f"folder:{photos}", "--backbone", "convnet-digits", "--batch-size", "4"]
    sizes = ["--queue-size", "4", "--epochs", "3", "--bn-splits", "1", "--knn-k", "2"]
    assert main(["pretrain", *options, *sizes, "--out", str(tmp_path / "run")]) == 0
    assert checkpoint.load(tmp_path / "run", checkpoint.BEST)["epoch"] == 2
    tested = read_metrics(tmp_path / "run")[2]["knn_top1"]
    line = f"best.pt is of epoch 2, with the best k-NN, projection of the validation images: 90.00 %, {tested:.2f} % of"
    assert line in capsys.readouterr().out


def test_the_validation_is_measured_and_a_run_can_be_resumed(tmp_path, capsys):
    assert main([*OPTIONS, "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert "validation" in capsys.readouterr().out
    assert all(0 <= record["recall@1_validation"] <= 100 for record in read_metrics(tmp_path))
    assert main(["supervise", "--resume", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("text", ["10", "100%", "-5%", "x", "nan%"])
def test_a_share_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="--validation: expected 0 or a percentage below 100%"):
        replace(HALF, validation=text)


@pytest.mark.parametrize(("share", "count"), [("10%", 1), ("90%", 5)])
def test_too_few_classes_on_either_side_are_refused(share, count):
    with pytest.raises(UserError, match=f"got {count} of 5 classes held out"):
        data_of(replace(HALF, validation=share))


def test_a_config_without_the_option_means_the_papers_protocol():
    values = resolved(SuperviseConfig())
    assert from_resolved({name: value for name, value in values.items() if name != "validation"}) == SuperviseConfig()
