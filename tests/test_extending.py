"""An adaptation, a method, a data set and a metric are added from outside and used from the command line."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import selfsup_xbn
from selfsup_xbn import (
    ADAPTATIONS,
    DATA_SETS,
    EVALUATORS,
    METHODS,
    METRICS,
    Adaptation,
    Config,
    FeatureEvaluator,
    ImageData,
    Method,
    Metric,
    Moments,
    Split,
    option,
    queue_from_config,
)
from selfsup_xbn.cli import main
from selfsup_xbn.config.command import command_of
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import read_config, read_metrics
from tests.command_line import PRETRAIN, SUPERVISE


class Isotropic(Adaptation):
    """The target has the mean of the batch, and one standard deviation for all dimensions."""

    def forward(self, observed, batch_size, finite):
        return Moments(observed.mean, observed.std.mean().expand_as(observed.std))


class NNCLR(Method):
    """NNCLR (Dwibedi et al., arXiv 2104.14548): the positive is the row of the queue nearest to the other view."""

    def __init__(self, encoder, queue, temperature, symmetric):
        super().__init__()
        self.encoder, self.queue, self.temperature, self.symmetric = encoder, queue, temperature, symmetric

    @classmethod
    def from_config(cls, config, encoder, images):
        return cls(encoder, queue_from_config(config, images), config.temperature, config.symmetric)

    def forward(self, views, labels, step=0, steps=1):
        a, b = (F.normalize(self.encoder(view), dim=1) for view in views)
        self.queue.adapt(a)
        self.queue.enqueue(a)
        loss = self.loss(a, b)
        return (loss + self.loss(b, a)) / 2 if self.symmetric else loss

    def loss(self, queries, others):
        logits = F.normalize(self.queue.nearest(queries), dim=1) @ others.T / self.temperature
        return F.cross_entropy(logits, torch.arange(len(logits)))


@dataclass(frozen=True, kw_only=True)
class NNCLRConfig(Config):
    """Self-supervised pretraining with nearest neighbors as positives (NNCLR)."""

    symmetric: bool = option(True, "each view is query and positive in turn")

    mode = "nnclr"
    method = NNCLR
    evaluator = "same-class"
    views = 2


def stripes(name, path, *, root, cache_bytes, workers):
    """Images of horizontal and vertical stripes."""
    pattern = 255 * (torch.arange(8) % 2).to(torch.uint8).expand(8, 8)
    images = torch.stack([pattern, pattern.T]).repeat(40, 1, 1)[:, None]
    images = (images * torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(0))).to(torch.uint8)
    split = Split(torch.arange(80) % 2, images)
    return ImageData(name, split, split, image_size=8, augmentation="digits", classes=("across", "upright"))


class SameClass(FeatureEvaluator):
    """Percent of images whose nearest other image is of their class."""

    main = "same_class"

    def measure(self, queries, labels, gallery=None, gallery_labels=None):
        similarity = F.normalize(queries, dim=1) @ F.normalize(queries, dim=1).T
        neighbor = similarity.fill_diagonal_(-torch.inf).argmax(1).cpu()
        return {"same_class": 100 * (labels[neighbor] == labels).double().mean().item()}


ADDED = (
    (ADAPTATIONS, "isotropic", Isotropic),
    (METHODS, "nnclr", NNCLRConfig),
    (DATA_SETS, "stripes", stripes),
    (EVALUATORS, "same-class", SameClass),
)
METRIC = Metric("same_class", "Same class", panel="same class [%]", label="trained", progress="same class {:.1f} %")


@pytest.fixture(autouse=True)
def _registered(unchecked):
    for registry, name, target in ADDED:
        registry.add(name, target, f"the {registry.kind} of this test")
    METRICS.append(METRIC)
    yield
    for registry, name, _ in ADDED:
        registry.remove(name)
    METRICS.remove(METRIC)


TINY = ["--data", "stripes", "--adaptation", "isotropic", "--backbone", "convnet-digits", "--dim", "8"]
TINY += ["--batch-size", "20", "--queue-size", "50%", "--epochs", "2", "--drift-every", "2"]


def test_all_four_train_and_evaluate_from_the_command_line(tmp_path, capsys, plots):
    run = tmp_path / "run"
    assert main(["nnclr", *TINY, "--no-symmetric", "--out", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "same class" in printed
    assert "Same class" in printed
    records = read_metrics(run)
    assert {"same_class_raw_pixels", "same_class_untrained"} <= records[0].keys()
    assert [0 <= record["same_class"] <= 100 for record in records[1:]] == [True, True]
    assert json.loads((run / "config.json").read_text())["symmetric"] is False
    method = checkpoint.load(run)["method"]
    assert method["queue.rows"].shape == (40, 8)

    assert main(["nnclr", "--resume", "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["evaluate", "same-class", "--run", str(run)]) == 0
    assert f"{records[-1]['same_class']:.2f}" in capsys.readouterr().out
    assert main(["evaluate", "knn", "--run", str(run), "--knn-k", "5"]) == 0
    assert main(["report", str(run), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert "same class [%]" in page
    assert "<span>nnclr</span>" in page
    assert command_of(read_config(run))[:2] == ["selfsup-xbn", "nnclr"]
    assert main(["nnclr", *TINY, "--dry-run"]) == 0


def test_the_adaptation_and_the_data_serve_the_other_modes(tmp_path):
    pretrain = [*PRETRAIN, *TINY, "--knn-k", "5"]
    assert main([*pretrain, "--out", str(tmp_path / "a")]) == 0
    gaps = read_metrics(tmp_path / "a")[-1]
    assert gaps["gap_mean_after"] < 1e-5
    assert gaps["gap_std_after"] > 1e-3
    supervise = [*SUPERVISE, *TINY, "--augmentation", "digits", "--images-per-class", "10"]
    assert main([*supervise, "--out", str(tmp_path / "b")]) == 0


def test_help_and_errors_name_what_was_added(capsys):
    for command, texts in {
        (): ["nnclr", "the method of this test"],
        ("nnclr",): ["--symmetric", "positive in turn", "isotropic", "stripes"],
        ("pretrain",): ["isotropic", "stripes"],
        ("evaluate",): ["same-class"],
    }.items():
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        printed = capsys.readouterr().out
        assert [text for text in texts if text not in printed] == []
    for argv, choice in ((["--adaptation", "isotropi"], "isotropic"), (["--data", "stripe"], "stripes")):
        assert main(["pretrain", *argv]) == 2
        assert f"did you mean {choice}?" in capsys.readouterr().err


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'xbn', which is registered"):
        ADAPTATIONS.add("xbn", Isotropic, "another")
    assert list(ADAPTATIONS) == ["xbm", "xbn", "axbn", "isotropic"]


def test_the_code_of_the_guide_runs(tmp_path):
    """The blocks of the package's README, with other names, train and evaluate."""
    guide = (Path(selfsup_xbn.__file__).parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert len(blocks) == 4
    split = stripes("", "", root="", cache_bytes=0, workers=0).test
    space = {name: getattr(selfsup_xbn, name) for name in selfsup_xbn.__all__}
    space |= {"torch": torch, "F": F, "dataclass": dataclass, "__name__": "guide"}
    space |= {"labels": split.labels, "images": split.images.repeat(1, 3, 1, 1)}
    space |= {"test": Split(space["labels"], space["images"])}
    names = {"isotropic": "guide-isotropic", "nnclr": "guide", "mine": "guide-data", "same-class": "guide-metric"}
    for block in blocks:
        for name, other in names.items():
            block = block.replace(f'"{name}"', f'"{other}"')
        exec(block, space)
    registries = (ADAPTATIONS, METHODS, DATA_SETS, EVALUATORS)
    try:
        options = ["guide", *TINY, "--adaptation", "guide-isotropic", "--data", "guide-data", "--image-size", "8"]
        assert main([*options, "--epochs", "1", "--knn-k", "5", "--no-symmetric", "--out", str(tmp_path)]) == 0
        assert main(["evaluate", "guide-metric", "--run", str(tmp_path)]) == 0
    finally:
        for registry, name in zip(registries, names.values(), strict=True):
            registry.remove(name)
        METRICS.pop()
