"""Encoders against the libraries that their parts come from."""

from __future__ import annotations

import importlib.util
import sys
import urllib.error

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from selfsup_xbn.errors import UserError
from selfsup_xbn.models import encoder as models
from selfsup_xbn.models.encoder import build_encoder
from selfsup_xbn.models.heads import HEADS
from selfsup_xbn.models.split_batch_norm import SplitBatchNorm2d


def images(batch: int = 4, channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- backbones


@pytest.mark.parametrize(
    ("name", "feature_dim", "channels", "size"),
    [
        *((*known, *shape) for known in (("convnet4", 256), ("convnet-digits", 128)) for shape in ((1, 8), (3, 32))),
        ("conv4-64", 64, 1, 28),
        ("conv4-64", 64, 3, 64),
    ],
)
def test_small_backbones_train_every_parameter_at_any_size(name, feature_dim, channels, size):
    encoder = build_encoder(name, 16, channels=channels, image_size=size)
    x = images(8, channels, size)
    embeddings = encoder(x)
    assert embeddings.shape == (8, 16)
    assert encoder.features(x).shape == (8, feature_dim)
    assert (encoder.feature_dim, encoder.dim) == (feature_dim, 16)
    embeddings.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_resnet_features_equal_torchvisions_penultimate_layer():
    model = torchvision.models.resnet18().eval()
    encoder = build_encoder("resnet18", 8).eval()
    encoder.backbone.load_state_dict(model.state_dict(), strict=False)
    penultimate = nn.Sequential(*list(model.children())[:-1], nn.Flatten())
    assert torch.equal(encoder.features(images()), penultimate(images()))


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v3_small",
        "shufflenet_v2_x0_5",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("convnext_tiny", "swin_t", "densenet121")),
    ],
)
def test_torchvision_classifier_fits_our_features(name):
    model = torchvision.models.get_model(name).eval()
    encoder = build_encoder(name, 8).eval()
    left_over = encoder.backbone.load_state_dict(model.state_dict(), strict=False).unexpected_keys
    classifier = model.get_submodule(left_over[0].removesuffix(".weight"))
    with torch.no_grad():
        torch.testing.assert_close(classifier(encoder.features(images())), model(images()))


def test_timm_features_are_timms_features():
    model = timm.create_model("resnet18", num_classes=0, in_chans=1).eval()
    encoder = build_encoder("timm:resnet18", 8, channels=1).eval()
    encoder.backbone.load_state_dict(model.state_dict())
    assert torch.equal(encoder.features(images(channels=1)), model(images(channels=1)))


def test_timm_vision_transformer_is_built_for_the_image_size():
    encoder = build_encoder("timm:vit_tiny_patch16_224", 8, image_size=64)
    assert encoder.backbone.pos_embed.shape == (1, 1 + (64 // 16) ** 2, encoder.feature_dim)
    assert encoder(images(size=64)).shape == (4, 8)


def test_cifar_resnet_differs_in_stem_and_resolution_alone():
    ours, theirs = build_encoder("resnet18-cifar", 8).backbone, torchvision.models.resnet18()
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items() if not name.startswith("fc.")}
    shapes["conv1.weight"] = torch.Size([64, 3, 3, 3])
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    resolutions = []
    for stage in (ours.conv1, ours.layer1, ours.layer4):
        stage.register_forward_hook(lambda _module, _input, output: resolutions.append(output.shape[-1]))
    ours(images())
    assert resolutions == [32, 32, 4]


@pytest.mark.parametrize("name", ["resnet18", "resnet18-cifar", "mobilenet_v3_small", "timm:resnet18"])
def test_gray_images_are_one_channel(name):
    assert build_encoder(name, 8, channels=1)(images(channels=1)).shape == (4, 8)


def test_new_encoder_has_initial_statistics_in_train_mode():
    encoder = build_encoder("resnet18-cifar", 8)
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.training and norm.running_mean.eq(0).all() and norm.num_batches_tracked == 0 for norm in norms)


def test_same_seed_same_encoder():
    def build() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return build_encoder("convnet-digits", 8).state_dict()

    first, second = build(), build()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_backbone_and_head_load_into_torchvision_resnet():
    encoder = build_encoder("resnet18", 10).eval()
    model = torchvision.models.resnet18(num_classes=10).eval()
    head = {f"fc.{name}": tensor for name, tensor in encoder.head.state_dict().items()}
    model.load_state_dict(encoder.backbone.state_dict() | head)
    assert torch.equal(model(images()), encoder(images()))


# ---------------------------------------------------------------- split batch norm


@pytest.mark.parametrize(("name", "norms"), [("resnet18-cifar", 20), ("convnet4", 4), ("timm:resnet18", 20)])
def test_bn_splits_reaches_every_batch_norm_of_the_backbone(name, norms):
    backbone = build_encoder(name, 8, bn_splits=4).backbone
    found = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [(type(norm), norm.splits) for norm in found] == [(SplitBatchNorm2d, 4)] * norms


def test_bn_splits_separates_the_parts_of_a_batch():
    encoder = build_encoder("convnet4", 8, bn_splits=2)
    x = images(8)
    other = torch.cat([x[:4], -x[4:]])
    assert torch.equal(encoder(x)[:4], encoder(other)[:4])
    assert not torch.equal(build_encoder("convnet4", 8)(x), encoder(x))


def test_bn_splits_without_batch_norm_is_refused():
    with pytest.raises(UserError, match=r"expected bn_splits=1 for backbone 'swin_t', which has no BatchNorm2d, got 4"):
        build_encoder("swin_t", 8, bn_splits=4)


# ---------------------------------------------------------------- heads


def linear(head: nn.Module, features: torch.Tensor) -> torch.Tensor:
    first = head if isinstance(head, nn.Linear) else head[0]
    return features @ first.weight.T + first.bias


def test_heads_compute_their_formulas():
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heads = {name: build(12, 6).double() for name, build in HEADS.items()}
    z = {name: linear(head, x) for name, head in heads.items()}
    expected = {
        "linear": z["linear"],
        "l2": z["l2"],
        "mlp": z["mlp"].relu() @ heads["mlp"][2].weight.T + heads["mlp"][2].bias,
    }
    for name, dims in (("l2+ln", 1), ("l2+bn", 0)):
        unit = z[name] / z[name].norm(dim=1, keepdim=True)
        variance, mean = torch.var_mean(unit, dims, correction=0, keepdim=True)
        expected[name] = (unit - mean) / (variance + 1e-5).sqrt()
    assert expected.keys() == HEADS.keys()
    for name, head in heads.items():
        torch.testing.assert_close(head(x), expected[name])


def test_embeddings_are_the_heads_output_not_normalized():
    encoder = build_encoder("convnet4", 8).eval()
    embeddings = encoder(images())
    assert torch.equal(embeddings, encoder.head(encoder.features(images())))
    assert not torch.allclose(embeddings, F.normalize(embeddings))


# ---------------------------------------------------------------- faults of the user


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "convnet5"}, "unknown backbone 'convnet5'; did you mean convnet4? (valid: "),
        ({"backbone": "resnet18_cifar"}, "unknown backbone 'resnet18_cifar'; did you mean resnet18-cifar or "),
        ({"backbone": "mobilenet_v3"}, "unknown backbone 'mobilenet_v3'; did you mean mobilenet_v2 or mobilenet_v3_"),
        ({"backbone": "timm:resnet18q"}, "unknown backbone 'timm:resnet18q'; did you mean timm:resnet18 or "),
        ({"head": "xyz"}, "unknown head 'xyz' (valid: linear, mlp, l2, l2+ln, l2+bn)"),
        (
            {"backbone": "xyz"},
            "unknown backbone 'xyz' (valid: conv4-64, convnet4, convnet-digits, efficientnet-lite0, resnet18-cifar and "
            "other ResNets, torchvision models but googlenet, inception, squeezenet, or timm:NAME)",
        ),
        ({"backbone": "timm:xyz"}, "unknown backbone 'timm:xyz' (valid: timm: and one of the "),
        ({"head": "mpl"}, "unknown head 'mpl'; did you mean mlp? (valid: linear, mlp, l2, l2+ln, l2+bn)"),
        ({"weights": "imagenet1k"}, "unknown weights 'imagenet1k'; did you mean imagenet? (valid: imagenet)"),
        ({"weights": "imagenet"}, "backbone 'convnet4' has no imagenet weights; pass a file with --weights FILE"),
        (
            {"backbone": "resnet18", "weights": "imagenet", "channels": 1},
            "expected 3 channels for the imagenet weights of 'resnet18', got 1; try 'timm:resnet18'",
        ),
    ],
)
def test_unknown_or_impossible_choices_are_named_in_one_line(arguments, message):
    with pytest.raises(UserError) as fault:
        build_encoder(**({"backbone": "convnet4", "dim": 8} | arguments))
    assert str(fault.value).startswith(message)
    assert "\n" not in str(fault.value)
    assert len(str(fault.value)) < 280


@pytest.mark.parametrize(("name", "size"), [("alexnet", 32), ("vit_b_16", 30), ("timm:mixer_s32_224", 32)])
def test_unsuitable_image_size_is_refused_in_one_line(name, size):
    with pytest.raises(UserError, match=f"'{name}' does not accept {size}-pixel images") as fault:
        build_encoder(name, 8, image_size=size)
    assert "\n" not in str(fault.value)


# ---------------------------------------------------------------- ImageNet weights


def test_imagenet_weights_are_the_librarys(monkeypatch):
    published = torchvision.models.resnet18().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(published))
    loaded = build_encoder("resnet18", 8, weights="imagenet").backbone.state_dict()
    assert all(torch.equal(tensor, published[name]) for name, tensor in loaded.items())


def test_no_network_for_imagenet_weights_points_to_a_file(monkeypatch):
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"'resnet18' .*no route to host.*--weights FILE") as fault:
        build_encoder("resnet18", 8, weights="imagenet")
    assert "\n" not in str(fault.value)


def test_timm_is_imported_only_for_a_timm_model(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # an import of it fails
    spec = importlib.util.spec_from_file_location("models_afresh", models.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert fresh.build_encoder("convnet4", 8)(images()).shape == (4, 8)
    with pytest.raises(ImportError):
        fresh.build_encoder("timm:resnet18", 8)
