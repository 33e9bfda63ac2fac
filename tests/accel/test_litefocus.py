"""Attention to the same frequency and to random tokens: golden values, and equality with masked dense attention."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from foley.accel.attention.litefocus import compensation_indices, flex_attention_of, sparse_attention
from foley.core.seeding import torch_generator

BATCH, HEADS, FRAMES, FREQUENCIES, DIM = 2, 3, 20, 4, 8
NUM_TOKENS = FRAMES * FREQUENCIES


def _qkv(split_heads: bool = False) -> list[torch.Tensor]:
    generator = torch_generator("q, k and v")
    if split_heads:  # the memory layout that attention layers hand over
        shape = BATCH, NUM_TOKENS, HEADS, DIM
        return [torch.randn(shape, generator=generator).transpose(1, 2) for _ in range(3)]
    return [torch.randn(BATCH, HEADS, NUM_TOKENS, DIM, generator=generator) for _ in range(3)]


def _masked_dense(indices: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    frequency = torch.arange(NUM_TOKENS) % FREQUENCIES
    mask = frequency[:, None] == frequency
    mask[:, indices] = True
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize(
    ("output", "settings"),
    [
        ("out.union", {}),
        ("out.official_both", {"double_count": True}),
        ("out.official_cross_only", {"same_frequency": False}),
        ("out.official_same_only", {"indices": torch.zeros(0, dtype=torch.long)}),
    ],
)
def test_golden_outputs_in_every_published_setting(shared: Path, output: str, settings: dict) -> None:
    with safe_open(str(shared / "golden" / "litefocus.safetensors"), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        num_frequencies = int(file.metadata()["f_n"])
    indices = settings.pop("indices", tensors["compensation_indices"])
    actual = sparse_attention(tensors["q"], tensors["k"], tensors["v"], num_frequencies, indices, **settings)
    torch.testing.assert_close(actual, tensors[output], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("split_heads", [False, True])
def test_sparse_equals_masked_dense_attention(ratio: float, split_heads: bool) -> None:
    indices = compensation_indices(NUM_TOKENS, ratio, torch_generator("C"))
    qkv = _qkv(split_heads)
    expected = _masked_dense(indices, *qkv)
    torch.testing.assert_close(sparse_attention(*qkv, FREQUENCIES, indices), expected, atol=1e-5, rtol=1e-5)


def test_all_tokens_as_compensation_are_dense_attention_unless_counted_twice() -> None:
    indices = compensation_indices(NUM_TOKENS, 1.0, torch_generator("C"))
    dense = F.scaled_dot_product_attention(*_qkv())
    torch.testing.assert_close(sparse_attention(*_qkv(), FREQUENCIES, indices), dense, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sparse_attention(*_qkv(), FREQUENCIES, indices, double_count=True), dense, atol=1e-3)


def test_one_frequency_is_dense_attention() -> None:
    indices = compensation_indices(NUM_TOKENS, 0.3, torch_generator("C"))
    dense = F.scaled_dot_product_attention(*_qkv())
    torch.testing.assert_close(sparse_attention(*_qkv(), 1, indices), dense, atol=1e-5, rtol=1e-5)


def test_a_query_ignores_all_that_is_outside_its_focus_set() -> None:
    q, k, v = _qkv()
    indices = torch.tensor([5, 17])  # both of frequency 1
    changed = v.clone()
    changed[:, :, 2::FREQUENCIES] += 1
    difference = sparse_attention(q, k, changed, FREQUENCIES, indices) - sparse_attention(q, k, v, FREQUENCIES, indices)
    touched = difference.abs().amax(dim=(0, 1, 3)).unflatten(0, (FRAMES, FREQUENCIES)).amax(dim=0)
    assert touched[2] > 0.5
    assert touched[[0, 1, 3]].tolist() == [0, 0, 0]


def test_compensation_tokens_are_different_seeded_and_counted_down() -> None:
    drawn = [compensation_indices(96, 0.1, torch_generator("C", seed)) for seed in (0, 0, 1)]
    assert len(drawn[0]) == len(set(drawn[0].tolist())) == 9
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert sorted(compensation_indices(7, 1.0, torch_generator("C")).tolist()) == list(range(7))
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        compensation_indices(7, 1.5, torch_generator("C"))


def test_what_cannot_be_attended_to_is_refused() -> None:
    empty = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="80 tokens do not divide into 7 frequencies"):
        sparse_attention(*_qkv(), 7, empty)
    with pytest.raises(ValueError, match="needs compensation tokens"):
        sparse_attention(*_qkv(), FREQUENCIES, empty, same_frequency=False)


@pytest.mark.parametrize("double_count", [False, True])
def test_flex_attention_is_the_same_attention(double_count: bool) -> None:
    qkv, indices = _qkv(), compensation_indices(NUM_TOKENS, 0.2, torch_generator("C"))
    expected = sparse_attention(*qkv, FREQUENCIES, indices, double_count)
    actual = flex_attention_of(*qkv, FREQUENCIES, indices, double_count, attend=flex_attention)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
