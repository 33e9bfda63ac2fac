"""Minimal filtering: its matrices are exact, and its convolutions those of PyTorch."""

import pytest
import torch
from torch.nn.functional import conv1d

from foley.models.codec.fast_decoder import WinogradConv, filtering_matrices


@pytest.mark.parametrize(("points", "outputs", "taps"), [((0, 1, -1), 2, 3), ((0, 1, -1, 0.5), 4, 2)])
def test_the_matrices_are_an_identity(points, outputs, taps):
    synthesis, filters, analysis = filtering_matrices(points, outputs, taps)
    signal, kernel = torch.randn(outputs + taps - 1).double(), torch.randn(taps).double()
    expected = signal.unfold(0, taps, 1) @ kernel
    torch.testing.assert_close(synthesis @ ((filters @ kernel) * (analysis @ signal)), expected)


@pytest.mark.parametrize("num_rows", [1, 5, 36, 2500])
@pytest.mark.parametrize(("taps", "dilation", "padding"), [(7, 1, 3), (7, 9, 27), (2, 1, 1)])
def test_it_is_the_convolution(num_rows, taps, dilation, padding):
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 3, taps).double(), torch.randn(5).double()
    rows = torch.randn(num_rows, 3).double()
    conv = WinogradConv(weight.permute(2, 1, 0), bias, dilation, padding)
    expected = conv1d(rows.T, weight, bias, dilation=dilation, padding=padding).T
    assert conv.output_rows(num_rows) == len(expected)
    torch.testing.assert_close(conv(rows), expected)


def test_single_precision_loses_little():
    torch.manual_seed(0)
    weight, rows = torch.randn(64, 64, 7) / (7 * 64) ** 0.5, torch.randn(4000, 64)
    conv = WinogradConv(weight.permute(2, 1, 0), torch.zeros(64), 1, 3)
    error = conv(rows) - conv1d(rows.T.double(), weight.double(), padding=3).T
    assert error.std() < 5e-6
    assert error.abs().max() < 5e-5
