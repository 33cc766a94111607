"""Checkpoints of every source that the documentation names, and files that are none."""

from __future__ import annotations

import argparse
import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import lightly
import pytest
import timm
import torch
import torchvision
from lightly.models.modules import MoCoProjectionHead
from safetensors.torch import save_file
from torch import nn

from selfsup_xbn.cli import main
from selfsup_xbn.errors import UserError
from selfsup_xbn.models.encoder import Encoder, build_encoder
from selfsup_xbn.models.pretrained import load_weights
from tests.command_line import SMALL, refused

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """A torchvision ResNet-18 whose parameters and statistics are not the initial ones."""
    return random_state(lambda: torchvision.models.resnet18(num_classes=128), seed=1)


@pytest.fixture(scope="module")
def initial() -> Encoder:
    return build_encoder("resnet18", 128)


@pytest.fixture
def encoder(initial) -> Encoder:
    return copy.deepcopy(initial)


@pytest.fixture
def small() -> Encoder:
    return build_encoder("convnet-digits", 8)


def random_state(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model with random parameters and statistics; the initial ones would be drawn in vain."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = make()
    for tensor in model.to_empty(device="cpu").state_dict().values():
        tensor.zero_()
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + 0.01)
    return model


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(content: object, folder: Path) -> Path:
    torch.save(content, folder / "weights.pt")
    return folder / "weights.pt"


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def output_before_fc(resnet: nn.Module) -> torch.Tensor:
    return nn.Sequential(*list(resnet.children())[:-1], nn.Flatten()).eval()(images())


# ---------------------------------------------------------------- sources


def test_torchvision_state_dict_leaves_only_fc_over(encoder, resnet, tmp_path):
    report = load_weights(encoder.backbone, saved(resnet.state_dict(), tmp_path))
    assert report.unexpected == ("fc.weight", "fc.bias")
    assert (report.missing, report.mismatched, report.outside, report.prefix) == ((), (), 0, "")
    assert len(report.matched) == len(encoder.backbone.state_dict())
    assert torch.equal(encoder.eval().features(images()), output_before_fc(resnet))


def test_timm_safetensors_and_torchvision_agree_on_a_resnet(encoder, tmp_path):
    model = random_state(lambda: timm.create_model("resnet18"), seed=2).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    load_weights(encoder, tmp_path / "model.safetensors")
    expected = model.forward_head(model.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(encoder.eval().features(images()), expected)


@pytest.mark.slow
def test_moco_checkpoint_gives_the_query_encoder_and_its_fc(encoder, resnet, tmp_path):
    keys = random_state(lambda: torchvision.models.resnet18(num_classes=128), seed=3).state_dict()
    state = prefixed("module.encoder_q.", resnet.state_dict()) | prefixed("module.encoder_k.", keys)
    checkpoint = {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": state | {"module.queue": torch.randn(128, 16), "module.queue_ptr": torch.zeros(1)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(64, 3, 7, 7)}}},
    }
    report = load_weights(encoder, saved(checkpoint, tmp_path))
    assert report.prefix == "state_dict.module.encoder_q."
    assert (report.missing, report.mismatched, report.unexpected) == ((), (), ())
    assert report.outside == len(keys) + 3
    assert torch.equal(encoder.eval()(images()), resnet.eval()(images()))


def test_moco_v2_checkpoint_fills_the_mlp_head(tmp_path):
    source, target = (build_encoder("convnet-digits", 8, head="mlp") for _ in range(2))
    state = source.backbone.state_dict() | prefixed("fc.", source.head.state_dict())
    report = load_weights(target, saved({"state_dict": prefixed("module.encoder_q.", state)}, tmp_path))
    assert report.missing == ()
    assert torch.equal(target.eval()(images()), source.eval()(images()))


def test_lightly_example_with_numbered_children(encoder, resnet, tmp_path):
    class MoCo(nn.Module):
        """The modules that lightly's MoCo example holds, in its order."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(*list(resnet.children())[:-1])
            self.projection_head = MoCoProjectionHead(512, 512, 128)
            other = random_state(torchvision.models.resnet18, seed=4)
            self.backbone_momentum = nn.Sequential(*list(other.children())[:-1])

    report = load_weights(encoder, saved({"state_dict": MoCo().state_dict(), "epoch": 3}, tmp_path))
    assert report.missing == ("head.weight", "head.bias")
    assert torch.equal(encoder.eval().features(images()), output_before_fc(resnet))


def test_lightly_checkpoint_with_named_children(encoder, resnet, tmp_path):
    state = {name: tensor for name, tensor in resnet.state_dict().items() if not name.startswith("fc.")}
    momentum = random_state(torchvision.models.resnet18, seed=5).state_dict()
    load_weights(encoder, saved(prefixed("backbone.", state) | prefixed("backbone_momentum.", momentum), tmp_path))
    assert torch.equal(encoder.eval().features(images()), output_before_fc(resnet))


@pytest.mark.parametrize("dropped", [True, False])
def test_numbered_children_of_a_cifar_resnet_load(dropped, tmp_path):
    source, target = (build_encoder("resnet18-cifar", 128) for _ in range(2))
    children = [child for name, child in source.backbone.named_children() if not (dropped and name == "maxpool")]
    report = load_weights(target, saved(prefixed("net.", nn.Sequential(*children).state_dict()), tmp_path))
    assert len(report.matched) == 120
    assert torch.equal(target.eval().features(images()), source.eval().features(images()))


def test_lightning_checkpoint(small, tmp_path):
    source = build_encoder("convnet-digits", 8)
    checkpoint = {
        "state_dict": prefixed("model.", source.state_dict()),
        "hyper_parameters": {"lr": 0.1},
        "pytorch-lightning_version": lightly.__version__,
        "loops": {"fit_loop": {"state_dict": {}}},
    }
    assert load_weights(small, saved(checkpoint, tmp_path)).missing == ()
    assert torch.equal(small.eval()(images()), source.eval()(images()))


def test_own_checkpoint_gives_the_query_encoder_whole(small, tmp_path):
    source, momentum = build_encoder("convnet-digits", 8), build_encoder("convnet-digits", 8)
    method = prefixed("encoder_q.", source.state_dict()) | prefixed("encoder_k.", momentum.state_dict())
    method["queue.rows"] = torch.zeros(4, 8)
    report = load_weights(small, saved({"method": method, "epoch": 1}, tmp_path))
    assert report.prefix == "method.encoder_q."
    assert torch.equal(small.eval()(images()), source.eval()(images()))


def test_compiled_modules_load_like_plain_ones(small, tmp_path):
    source = build_encoder("convnet-digits", 8)
    state = prefixed("backbone._orig_mod.", source.backbone.state_dict()) | prefixed("head.", source.head.state_dict())
    assert load_weights(small, saved(state, tmp_path)).missing == ()
    assert torch.equal(small.eval()(images()), source.eval()(images()))


def test_half_precision_file_keeps_the_encoder_in_float32(encoder, resnet, tmp_path):
    half = {name: tensor.half() for name, tensor in resnet.state_dict().items()}
    load_weights(encoder, saved(half, tmp_path))
    weight = encoder.backbone.conv1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, half["conv1.weight"].float())


def test_training_arguments_beside_the_tensors_do_no_harm(encoder, resnet, tmp_path):
    checkpoint = {"model": resnet.state_dict(), "args": argparse.Namespace(lr=0.1)}
    assert load_weights(encoder, saved(checkpoint, tmp_path)).prefix == "model."


# ---------------------------------------------------------------- the report


def test_tensor_of_another_shape_is_named_and_left(tmp_path):
    target = build_encoder("resnet18-cifar", 128).backbone
    before = target.conv1.weight.clone()
    report = load_weights(target, saved(torchvision.models.resnet18().state_dict(), tmp_path))
    assert report.mismatched == ("conv1.weight: expected [64, 3, 3, 3], got [64, 3, 7, 7]",)
    assert torch.equal(target.conv1.weight, before)


def test_lines_count_everything_and_cut_long_lists(encoder, resnet, tmp_path):
    state = {name: tensor for name, tensor in resnet.state_dict().items() if not name.startswith(("layer4.1.", "fc."))}
    path = saved({"state_dict": state | {"a.b": torch.zeros(1)}, "other": torch.zeros(2)}, tmp_path)
    assert load_weights(encoder.backbone, path).lines() == [
        f"{path}: 108 of 118 tensors matched under 'state_dict.'",
        "  missing in the file (10): layer4.1.conv1.weight, layer4.1.bn1.weight, layer4.1.bn1.bias, "
        "layer4.1.bn1.running_mean, and 6 more",
        "  unexpected in the file (1): a.b",
        "  not loaded, without the prefix: 1 tensors",
    ]


# ---------------------------------------------------------------- another network


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("resnet18", "resnet34"),
        pytest.param("resnet34", "resnet18", marks=pytest.mark.slow),
        pytest.param("resnet50", "resnet18", marks=pytest.mark.slow),
    ],
)
def test_network_that_fits_by_half_is_refused(source, target, tmp_path):
    """All tensors of ResNet-18 fit ResNet-34, and the other way round."""
    with torch.device("meta"):
        states = [torchvision.models.get_model(name).state_dict() for name in (source, target)]
    theirs, ours = (
        {name: tensor.shape for name, tensor in state.items() if not name.startswith("fc.") and tensor.ndim}
        for state in states
    )
    path = saved({name: torch.zeros(shape) for name, shape in theirs.items()}, tmp_path)
    encoder = build_encoder(target, 8)
    message = refusal(encoder, path)
    assert f"fits {len(theirs.items() & ours.items())} of the {len(ours)} tensors" in message
    assert f"has {len(theirs.keys() - ours.keys())} further tensors" in message
    assert "--partial-weights" in message
    assert load_weights(encoder, path, partial=True).matched


@pytest.mark.parametrize("head", ["fc", "projection_head", "none", "other"])
def test_missing_or_other_head_is_no_reason_to_refuse(encoder, resnet, head, tmp_path):
    state = {name: tensor for name, tensor in resnet.state_dict().items() if not name.startswith("fc.")}
    rows = {"fc": 128, "other": 1000}
    if head in rows:
        state |= {"fc.weight": torch.zeros(rows[head], 512), "fc.bias": torch.zeros(rows[head])}
    elif head == "projection_head":
        state |= {f"projection_head.layers.{i}.weight": torch.zeros(512, 512) for i in range(40)}
    load_weights(encoder, saved(state, tmp_path))
    assert torch.equal(encoder.backbone.conv1.weight, resnet.conv1.weight)


def test_file_with_the_head_only_is_refused(tmp_path):
    encoder = build_encoder("convnet-digits", 8)
    assert "fits 0 of the 15 tensors" in refusal(encoder, saved(prefixed("head.", encoder.head.state_dict()), tmp_path))


def test_command_refuses_partial_weights_unless_told(tmp_path, capsys):
    state = build_encoder("convnet4", 8, channels=1).backbone.state_dict()
    path = saved(state, tmp_path)
    options = ["--backbone", "convnet-digits", "--weights", str(path)]
    train = ["pretrain", *SMALL[1:], *options, "--out", str(tmp_path / "run")]
    evaluate = ["evaluate", "knn", *options, "--data", "digits", "--knn-k", "5", "--limit-train", "64"]
    for command in (train, evaluate):
        refusal = refused(capsys, command)
        assert "of the 15 tensors of the backbone and has 5 further tensors" in refusal
    assert not (tmp_path / "run").exists()
    assert main([*train, "--partial-weights"]) == 0


def test_partial_weights_need_a_weights_file(finished_run, capsys):
    command = ["evaluate", "knn", "--run", str(finished_run), "--partial-weights"]
    assert "--partial-weights is valid with --weights only" in refused(capsys, command)


# ---------------------------------------------------------------- files that cannot be used


class Malicious:
    """A pickle that creates a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def refusal(model: nn.Module, path: Path) -> str:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as fault:
        load_weights(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    message = str(fault.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_pickle_is_refused_and_not_run(write, small, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "weights.pt"
    write({"state_dict": small.state_dict(), "evil": Malicious(mark)}, path)
    assert "expected tensors and plain values" in refusal(small, path)
    assert not mark.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert mark.exists()  # the file is what it pretends to be


def test_whole_module_is_refused_with_its_class(small, tmp_path):
    message = refusal(small, saved(nn.Linear(2, 2), tmp_path))
    assert "torch.nn.modules.linear.Linear" in message
    assert "state_dict()" in message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", ["half", b"", b"hello world\n", b"\xff\xd8\xff\xe0 a picture"])
def test_damaged_files_and_other_files_are_refused(content, suffix, small, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if content == "half":
        save_file({"a": torch.ones(9)}, path) if suffix == ".safetensors" else torch.save(small.state_dict(), path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    assert "is no checkpoint or is truncated" in refusal(small, path)


def test_missing_file_and_folder_are_refused(small, tmp_path):
    assert "which is not a file" in refusal(small, tmp_path / "absent.pt")
    assert "which is not a file" in refusal(small, tmp_path)


def test_file_without_tensors_is_refused(small, tmp_path):
    assert "which contains no tensors" in refusal(small, saved({"epoch": 3}, tmp_path))


def test_weights_of_another_architecture_are_refused(small, resnet, tmp_path):
    message = refusal(small, saved(resnet.state_dict(), tmp_path))
    assert "got conv1.weight [64, 3, 7, 7]" in message
    assert "expected backbone.0.0.weight [32, 3, 3, 3]" in message
