"""SplitBatchNorm2d as Triton kernels against PyTorch's in float64: on a GPU, or in Triton's interpreter."""

import copy

import pytest
import torch
from torch import nn

from selfsup_xbn.models.split_batch_norm import SplitBatchNorm2d

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
CASES = {  # B, C, H, W, splits
    "odd": (13, 5, 7, 3, 4),
    "several parts": (5, 40, 13, 16, 2),
    "one pixel": (24, 70, 1, 1, 8),
    "one channel": (4, 1, 9, 9, 2),
    "few images": (5, 6, 5, 4, 8),
}


def drawn(case, dtype=torch.float32, layout=torch.contiguous_format):
    """Return a layer with parameters and statistics that are not the initial ones, images, and their gradient."""
    B, C, H, W, splits = CASES[case]
    generator = torch.Generator().manual_seed(0)
    norm = SplitBatchNorm2d(C, splits, eps=1e-3, momentum=0.3)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    norm.implementation = "triton"
    images, slopes = torch.randn(2, B, C, H, W, generator=generator).unbind()
    offset = 3 * torch.randn(C, 1, 1, generator=generator)
    return norm.to(DEVICE), *(t.to(DEVICE, dtype, memory_format=layout) for t in (images * 2 + offset, slopes))


def outputs(norm, images, slopes):
    """Return the output, the gradients of the input, the weight and the bias, and the buffers after two steps."""
    for _ in range(2):
        x = images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = norm(x)
        gradients = torch.autograd.grad(y, (x, *norm.parameters()), slopes)
    return y, *gradients, *norm.buffers()


def with_implementation(norm, name):
    norm = copy.deepcopy(norm)
    norm.implementation = name
    return norm


def expected_outputs(norm, images, slopes):
    reference = copy.deepcopy(norm).double()
    assert reference.implementation == "triton"  # which takes no float64
    return outputs(reference, images.double(), slopes.double())


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-9)).item()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "case", ["odd", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "odd")]
)
def test_kernels_equal_pytorch_in_float64(case, layout):
    norm, images, slopes = drawn(case, layout=FORMATS[layout])
    expected = expected_outputs(norm, images, slopes)
    pytorch = outputs(with_implementation(norm, "torch"), images, slopes)
    actual = outputs(norm, images, slopes)
    for number, (value, other, reference) in enumerate(zip(actual, pytorch, expected, strict=True)):
        # The gradient of three pixels is a small difference of large terms, and PyTorch's error is ten times that of
        # the other cases.
        assert error(value, reference) < max(2e-6, 10 * error(other, reference)), number
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_half_precision_has_float32_statistics(dtype):
    norm, images, slopes = drawn("odd", dtype, torch.channels_last)
    y, grad_x, *rest = outputs(copy.deepcopy(norm), images, slopes)
    expected_y, expected_grad_x, *expected = expected_outputs(norm, images, slopes)
    limit = 1e-3 if dtype == torch.float16 else 1e-2  # the interpreter cuts off where a GPU rounds to bfloat16
    assert y.dtype == grad_x.dtype == dtype
    assert error(y, expected_y) < limit
    assert error(grad_x, expected_grad_x) < limit
    for value, reference in zip(rest, expected, strict=True):
        assert error(value, reference) < 2e-6


@pytest.mark.slow
def test_large_offset_does_not_cancel():
    norm, images, slopes = drawn("several parts")
    images = images + 1000
    expected = expected_outputs(norm, images, slopes)
    for value, reference in zip(outputs(norm, images, slopes), expected, strict=True):
        assert error(value, reference) < 2e-4  # float32 rounds 1000 to 6e-5


@pytest.mark.parametrize("layout", ["channels last", "contiguous"])
@pytest.mark.slow
def test_kernels_take_other_strides(layout):
    norm, images, slopes = drawn("odd", layout=FORMATS[layout])
    expected = outputs(copy.deepcopy(norm), images, slopes)
    wide = torch.stack([images, images], -1)[..., 0]
    for value, reference in zip(outputs(copy.deepcopy(norm), wide, slopes), expected, strict=True):
        torch.testing.assert_close(value, reference)
    transposed = slopes.transpose(2, 3).contiguous().transpose(2, 3)
    for value, reference in zip(outputs(norm, images, transposed), expected, strict=True):
        assert torch.equal(value, reference)


@pytest.mark.parametrize("layout", FORMATS)
def test_output_and_gradient_keep_the_memory_format(layout):
    norm, images, slopes = drawn("odd", layout=FORMATS[layout])
    y, grad_x, *_ = outputs(norm, images, slopes)
    assert y.is_contiguous(memory_format=FORMATS[layout])
    assert grad_x.is_contiguous(memory_format=FORMATS[layout])


@pytest.mark.slow
def test_layer_without_parameters_and_without_gradient():
    _, images, slopes = drawn("odd")
    plain, fused = (SplitBatchNorm2d(5, 4, affine=False).to(DEVICE) for _ in "ab")
    plain.implementation, fused.implementation = "torch", "triton"
    for value, reference in zip(*(outputs(norm, images, slopes) for norm in (fused, plain)), strict=True):
        torch.testing.assert_close(value, reference)
    with torch.no_grad():
        assert not fused(images).requires_grad


def test_nan_stays_in_its_channel_and_split():
    norm, images, _ = drawn("odd")
    images[0, 2] = torch.nan
    y = norm(images)
    assert y[:4, 2].isnan().all()
    assert y.isnan().sum() == y[:4, 2].numel()
    assert norm.running_mean.isnan().nonzero().flatten().tolist() == [2]


@pytest.mark.slow
def test_inplace_relu_after_the_kernels():
    norm, images, slopes = drawn("odd")
    reference = copy.deepcopy(norm)
    reference.implementation = "torch"
    values, expected = (
        outputs(nn.Sequential(layer, nn.ReLU(inplace=True)), images, slopes) for layer in (norm, reference)
    )
    for value, other in zip(values, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_refused():
    norm, images, _ = drawn("odd")
    (gradient,) = torch.autograd.grad(norm(images.requires_grad_()).square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
