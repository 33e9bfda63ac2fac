import pytest
import torch
from pretend_device import PretendDevice

from foley.core.seeding import torch_generator
from foley.models.dit.masking import SpanMask


def draw(mask=None, batch_size=256, num_frames=100):
    return (mask or SpanMask())(batch_size, num_frames, torch_generator("mask", 0))


def test_is_a_function_of_its_generator():
    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), SpanMask()(256, 100, torch_generator("mask", 1)))


def test_ratios_fill_the_given_range():
    ratios = draw(batch_size=2000).float().mean(dim=1)
    assert 0.19 < ratios.min() <= 0.3
    assert ratios.max() == 1
    assert abs(float(ratios.mean()) - 0.625) < 0.02


def runs(mask: torch.Tensor) -> list[int]:
    """Lengths of the runs of true and of false frames `[L]`."""
    return torch.unique_consecutive(mask, return_counts=True)[1].tolist()


@pytest.mark.parametrize(("num_frames", "ratio"), [(100, 0.3), (101, 0.5), (500, 0.25), (47, 0.5)])
def test_no_run_is_shorter_than_a_span_at_the_ends_either(num_frames, ratio):
    hidden = draw(SpanMask(span_frames=10, ratio=(ratio, ratio)), batch_size=64, num_frames=num_frames)
    assert min(min(runs(row)) for row in hidden) >= 10
    assert abs(float(hidden.float().mean()) - ratio) < 0.05


def test_the_end_of_a_padded_clip_is_an_end():
    valid = torch.arange(100) < torch.randint(20, 101, (256, 1), generator=torch_generator("lengths"))
    hidden = SpanMask(span_frames=10, ratio=(0.3, 0.6))(256, 100, torch_generator("mask", 0), valid)
    assert min(min(runs(row[real])) for row, real in zip(hidden, valid, strict=True)) >= 10
    assert (hidden & valid).any(dim=1).all()


def test_a_mask_beside_a_device_waits_for_nothing():
    valid = torch.arange(100) < torch.tensor([[100], [55]])
    expected = SpanMask()(2, 100, torch_generator("mask", 0), valid)
    with PretendDevice() as device:
        found = SpanMask()(2, 100, torch_generator("mask", 0), device.put(valid))
        assert torch.equal(device.get(found), expected)
    assert device.waits == []


def test_every_frame_is_hidden_equally_often():
    share = draw(SpanMask(ratio=(0.5, 0.5)), batch_size=4000).float().mean(dim=0)
    assert (share - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("num_frames", [1, 7, 10, 101])
def test_every_item_hides_a_frame_whatever_the_length(num_frames):
    hidden = draw(SpanMask(ratio=(0.01, 0.01)), num_frames=num_frames)
    assert hidden.shape == (256, num_frames)
    assert hidden.any(dim=1).all()


def test_partial_probability_is_the_share_that_is_not_hidden_in_full():
    hidden = draw(SpanMask(ratio=(0.5, 0.5), partial_probability=0.25), batch_size=4000)
    assert abs(float((~hidden.all(dim=1)).float().mean()) - 0.25) < 0.03
    assert draw(SpanMask(partial_probability=0.0)).all()


def test_refuses_ratios_outside_the_unit_interval():
    with pytest.raises(ValueError, match="ratio"):
        SpanMask(ratio=(0.5, 1.5))
