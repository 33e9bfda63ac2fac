import pytest
import torch

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


def test_hides_whole_spans():
    hidden = draw(SpanMask(span_frames=10, ratio=(0.3, 0.3)), batch_size=64).int()
    assert (hidden.sum(dim=1) == 30).all()
    rising = (hidden.diff(dim=1) == 1).sum(dim=1) + hidden[:, 0]
    assert (rising <= 4).all()


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
