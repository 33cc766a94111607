"""SplitBatchNorm2d against a loop of BatchNorm2d over the parts, in float64."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from selfsup_xbn.models.split_batch_norm import SplitBatchNorm2d, split_batch_norms

FORMATS = [torch.contiguous_format, torch.channels_last]


def images(batch: int, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 6, 5, 4, generator=generator, dtype=torch.float64) * 3 + 1
    return x.contiguous(memory_format=memory_format).requires_grad_()


def filled(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """The layer with parameters and statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(0)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return norm


def run(norm: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = norm(x)
    return y, *torch.autograd.grad((y * weights).sum(), (x, *norm.parameters()))


class Loop(nn.Module):
    """The literal reference: a BatchNorm2d for each part, all with the same parameters; then the statistics' mean."""

    def __init__(self, norm: nn.BatchNorm2d, parts: int) -> None:
        super().__init__()
        self.norm = norm
        self.parts = parts
        self.mean, self.var = norm.running_mean.clone(), norm.running_var.clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs, means, variances = [], [], []
        for part in x.tensor_split(self.parts):
            self.norm.running_mean, self.norm.running_var = self.mean.clone(), self.var.clone()
            outputs.append(self.norm(part))
            means.append(self.norm.running_mean)
            variances.append(self.norm.running_var)
        self.mean, self.var = torch.stack(means).mean(0), torch.stack(variances).mean(0)
        return torch.cat(outputs)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("batch", "splits", "parts"),
    [(16, 8, 8), (16, 1, 1), (13, 4, 4), (19, 8, 8), (15, 8, 7), (5, 8, 2), (3, 8, 1), (2, 8, 1), (1, 2, 1)],
)
def test_equals_a_batch_norm_for_each_part(batch, splits, parts, memory_format):
    split = filled(SplitBatchNorm2d(6, splits).double())
    reference = Loop(filled(nn.BatchNorm2d(6).double()), parts)
    for _ in range(2):
        x = images(batch, memory_format)
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for got, expected in zip(run(split, x, weights), run(reference, x, weights), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(split.running_mean, reference.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(split.running_var, reference.var, rtol=1e-12, atol=1e-12)
    assert split.num_batches_tracked == 2


@pytest.mark.parametrize("batch", [16, 13])
def test_output_keeps_the_memory_format(batch):
    norm = SplitBatchNorm2d(6, 4).double()
    for memory_format in FORMATS:
        assert norm(images(batch, memory_format)).is_contiguous(memory_format=memory_format)


def test_one_split_is_batch_norm_to_the_bit():
    split, plain = filled(SplitBatchNorm2d(6, 1)), filled(nn.BatchNorm2d(6))
    x = images(8).detach().float()
    assert torch.equal(split(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(split.buffers(), plain.buffers(), strict=True))


def test_eval_mode_is_batch_norm_with_running_statistics():
    split, plain = filled(SplitBatchNorm2d(6, 4)).eval(), filled(nn.BatchNorm2d(6)).eval()
    x = images(8).detach().float()
    assert torch.equal(split(x), plain(x))
    assert all(torch.equal(a, b) for a, b in zip(split.buffers(), filled(nn.BatchNorm2d(6)).buffers(), strict=True))


def test_sample_depends_on_its_own_part_alone():
    norm = SplitBatchNorm2d(6, 4).double()
    x = images(16)
    (gradient,) = torch.autograd.grad((norm(x)[5] ** 3).sum(), x)
    assert gradient.abs().sum((1, 2, 3)).ne(0).nonzero().flatten().tolist() == [4, 5, 6, 7]


def test_bfloat16_input_is_normalized_with_float32_statistics():
    norm = filled(SplitBatchNorm2d(6, 4))
    x = images(16).detach().bfloat16()
    expected = filled(SplitBatchNorm2d(6, 4))(x.float())
    got = norm(x)
    assert got.dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(got.float(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.slow
def test_compiles_as_one_graph_with_the_same_result(unchecked):
    eager, plain = filled(SplitBatchNorm2d(6, 4)), filled(SplitBatchNorm2d(6, 4))
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    x = images(13).detach().float()
    torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(plain.running_var, eager.running_var)


def test_fewer_than_one_split_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        SplitBatchNorm2d(6, 0)


def test_split_batch_norms_replaces_all_and_keeps_the_state():
    plain, model = torchvision.models.resnet18(), torchvision.models.resnet18()
    model.load_state_dict(plain.state_dict())
    split_batch_norms(model, 2)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [type(norm) for norm in norms] == [SplitBatchNorm2d] * 20
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert list(model.state_dict()) == list(plain.state_dict())
