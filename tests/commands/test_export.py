"""What other programs read of a run computes what the run's encoder computes."""

import csv
import resource
import signal

import pytest
import torch
import torchvision

from selfsup_xbn.cli import main
from selfsup_xbn.commands.export import export_run
from selfsup_xbn.config.modes import PretrainConfig, SuperviseConfig
from selfsup_xbn.config.registry import EXPORTS
from selfsup_xbn.config.schema import resolved
from selfsup_xbn.models.encoder import build_encoder, random_encoder
from selfsup_xbn.models.pretrained import load_weights
from selfsup_xbn.runs import checkpoint
from selfsup_xbn.runs.folder import RunFolder, read_metrics
from tests.command_line import contents, refused


def made_run(folder, channels=3, image_size=32, best=False, **options):
    """A run as training leaves it, with weights and statistics like no others; its encoder in eval mode."""
    kind = SuperviseConfig if best else PretrainConfig
    config = kind(out=str(folder), **options)
    encoder = random_encoder(config, channels, image_size)
    with torch.no_grad():
        for _, tensor in [*encoder.named_parameters(), *encoder.named_buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand_like(tensor)).add_(0.01 * torch.rand_like(tensor))
    log = RunFolder(folder, config)
    log.log({"epoch": 0, "recall@1_untrained": 4.0})
    log.log({"epoch": 1, "loss": float("nan"), 'with "quotes", and commas': 2})
    log.close()
    prefix = "encoder." if best else "encoder_q."
    state = {"config": resolved(config), "network": {"channels": channels, "image_size": image_size}}
    state["method"] = {prefix + name: value for name, value in encoder.state_dict().items()}
    checkpoint.save(state, folder, checkpoint.BEST if best else checkpoint.NAME)
    return encoder.eval()


def close(found, wanted):
    torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_resnet18_loads_into_torchvisions_as_it_is(tmp_path, capsys):
    encoder = made_run(tmp_path, backbone="resnet18", bn_splits=8)
    assert main(["export", str(tmp_path), "--format", "torchvision"]) == 0
    model = torchvision.models.resnet18()
    model.load_state_dict(torch.load(tmp_path / "backbone.pt", weights_only=True))
    images = torch.randn(3, 3, 40, 40)
    assert not model.eval()(images).any()  # the classifier is zeros
    model.fc = torch.nn.Identity()
    close(model(images), encoder.features(images))
    printed = capsys.readouterr().out
    assert "fc.weight [1000, 512], fc.bias [1000]" in printed
    assert "differs from the plain" not in printed


@torch.no_grad()
@pytest.mark.slow
def test_resnet_for_small_images_loads_after_the_printed_change(tmp_path):
    encoder = made_run(tmp_path, channels=1, backbone="resnet18-cifar", bn_splits=2)
    (change,) = [
        line for line in export_run(tmp_path, "torchvision") if line.startswith("differs from the plain resnet18")
    ]
    model = torchvision.models.resnet18()
    exec(change.partition(": ")[2], {"model": model, "torch": torch})
    model.load_state_dict(torch.load(tmp_path / "backbone.pt", weights_only=True))
    model.fc = torch.nn.Identity()
    images = torch.randn(2, 1, 32, 32)
    close(model.eval()(images), encoder.features(images))


def test_what_differs_from_torchvisions_model_is_named(tmp_path):
    made_run(tmp_path, channels=1, backbone="shufflenet_v2_x0_5")
    (difference,) = [line for line in export_run(tmp_path, "torchvision") if "differs from the plain" in line]
    assert "conv1.0.weight is [24, 1, 3, 3] instead of [24, 3, 3, 3]" in difference


@torch.no_grad()
def test_safetensors_hold_the_whole_encoder_and_its_settings(tmp_path):
    from safetensors import safe_open

    encoder = made_run(tmp_path, backbone="convnet4", head="l2+bn", best=True, dim=16)
    export_run(tmp_path, "safetensors", tmp_path / "new" / "e.safetensors", best=True)
    with safe_open(tmp_path / "new" / "e.safetensors", "pt") as file:
        metadata = file.metadata()
        assert {name: file.get_tensor(name).shape for name in file.keys()} == {  # noqa: SIM118
            name: value.shape for name, value in encoder.state_dict().items()
        }
    settings = {name: metadata[name] for name in ("backbone", "head")}
    fresh = build_encoder(**settings, dim=int(metadata["dim"]), channels=int(metadata["channels"]))
    assert load_weights(fresh, tmp_path / "new" / "e.safetensors").missing == ()
    images = torch.randn(2, 3, 32, 32)
    close(fresh.eval()(images), encoder(images))


@torch.no_grad()
def test_printed_line_loads_the_file_into_timm(tmp_path):
    import safetensors.torch
    import timm

    encoder = made_run(tmp_path, backbone="efficientnet-lite0", weights="imagenet", mean="0.25")
    lines = export_run(tmp_path, "safetensors")
    (line,) = [line for line in lines if "timm.create_model" in line]
    with safetensors.safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["load"] == line
    assert metadata["mean"] == "[0.25, 0.25, 0.25]"
    names = {"timm": timm, "safetensors": safetensors, "FILE": tmp_path / "encoder.safetensors"}
    exec(line, names)
    images = torch.randn(2, 3, 32, 32)
    close(names["model"].eval()(images), encoder.features(images))


def test_statistics_of_the_network_are_exported_without_the_photographs(tmp_path):
    import safetensors

    made_run(tmp_path, backbone="efficientnet-lite0", weights="imagenet", data="folder:elsewhere")
    assert "(pixel / 255 - [0.5, 0.5, 0.5]) / [0.5, 0.5, 0.5]" in export_run(tmp_path, "safetensors")[-1]
    with safetensors.safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        assert file.metadata()["std"] == "[0.5, 0.5, 0.5]"


@pytest.mark.slow
@torch.no_grad()
def test_onnx_graph_computes_both_outputs_for_any_batch(tmp_path, unchecked):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    encoder = made_run(tmp_path, channels=1, image_size=8, backbone="convnet-digits", bn_splits=4, head="mlp", dim=7)
    export_run(tmp_path, "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "encoder.onnx",
        "metrics.jsonl",
    ]
    session = runtime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        images = torch.randn(batch, 1, 8, 8)
        features, embeddings = session.run(["features", "embeddings"], {"images": images.numpy()})
        close(features, encoder.features(images))
        close(embeddings, encoder(images))


def test_csv_is_the_metrics_with_blanks(tmp_path):
    made_run(tmp_path, backbone="convnet-digits")
    export_run(tmp_path, "csv")
    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "recall@1_untrained", "loss", 'with "quotes", and commas']
    for row, record in zip(rows, read_metrics(tmp_path), strict=True):
        known = {name: str(value) for name, value in record.items() if value is not None}
        assert {name: value for name, value in row.items() if value} == known


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--format", "torchvision"], ["convnet-digits", "safetensors"]),
        (["--format", "onxx"], ["onxx"]),
        (["--format", "csv", "--best"], ["--best"]),
        (["--format", "safetensors", "--best"], ["best.pt"]),
        (["--format", "csv", "--out", "RUN"], ["exists"]),
        (["--format", "csv", "--out", "RUN/config.json"], ["config.json exists", "--overwrite"]),
        (["--format", "csv", "--out", "RUN/config.json/x"], ["config.json"]),
        (["--format", "onnx"], ["selfsup-xbn[export]"]),
        ([], ["--format"]),
    ],
)
def test_error_is_one_line_and_nothing_is_written(tmp_path, capsys, options, parts, monkeypatch):
    made_run(tmp_path, channels=1, image_size=8, backbone="convnet-digits")
    before = contents(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused(capsys, ["export", str(tmp_path), *(option.replace("RUN", str(tmp_path)) for option in options)])
    assert all(part in message for part in parts)
    assert contents(tmp_path) == before


def test_a_folder_that_is_created_for_the_file_is_named(tmp_path):
    made_run(tmp_path / "run", channels=1, image_size=8, backbone="convnet-digits")
    note = f"new folder: {tmp_path / 'new'}"
    assert export_run(tmp_path / "run", "csv", tmp_path / "new" / "a.csv")[0] == note
    assert note not in export_run(tmp_path / "run", "csv", tmp_path / "new" / "b.csv")


@pytest.mark.parametrize("kind", ["csv", "torchvision", "safetensors"])
def test_full_disk_leaves_the_old_file_and_one_line(tmp_path, capsys, kind):
    made_run(tmp_path, backbone="shufflenet_v2_x0_5")
    export_run(tmp_path, kind)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        message = refused(capsys, ["export", str(tmp_path), "--format", kind, "--overwrite"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert EXPORTS[kind] in message
    assert "--out" in message
    assert contents(tmp_path) == before


def test_new_run_takes_old_exports_away(tmp_path):
    made_run(tmp_path, channels=1, image_size=8, backbone="convnet-digits")
    for kind in ("csv", "safetensors"):
        export_run(tmp_path, kind)
        export_run(tmp_path, kind, overwrite=True)
    made_run(tmp_path, channels=1, image_size=8, backbone="convnet-digits")
    assert not {path.name for path in tmp_path.iterdir()} & set(EXPORTS.values())
