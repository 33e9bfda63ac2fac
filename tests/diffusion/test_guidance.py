import pytest
import torch

from foley.core.seeding import torch_generator
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning, KnownLatent


def predictions() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 4, 20, generator=torch_generator("guidance")).unbind()


def conditioning(batch: int, tokens: int) -> Conditioning:
    context = torch.randn(batch, tokens, 6, generator=torch_generator("context", tokens))
    return Conditioning(context, torch.ones(batch, tokens, dtype=torch.bool))


def mean_model(noisy, timestep, context, context_mask):
    """A stand-in denoiser whose output depends on every valid token."""
    mask = context_mask[..., None].float()
    pooled = (context * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))
    return noisy * timestep[:, None, None] + pooled[:, None, None]


def test_equation_1():
    positive, negative = predictions()
    guided = ClassifierFreeGuidance(3.0).combine(positive, negative)
    torch.testing.assert_close(guided, negative + 3 * (positive - negative))


def test_full_rescale_restores_the_conditional_spread_item_by_item():
    positive, negative = predictions()
    positive = positive * torch.tensor([1.0, 2.0, 5.0])[:, None, None]
    guided = ClassifierFreeGuidance(5.0, 1.0).combine(positive, negative)
    torch.testing.assert_close(guided.std(dim=(1, 2)), positive.std(dim=(1, 2)))
    alone = ClassifierFreeGuidance(5.0, 1.0).combine(positive[1:2], negative[1:2])
    torch.testing.assert_close(guided[1:2], alone)


def test_equations_2_and_3():
    positive, negative = predictions()
    plain = ClassifierFreeGuidance(5.0).combine(positive, negative)
    full = ClassifierFreeGuidance(5.0, 1.0).combine(positive, negative)
    torch.testing.assert_close(
        ClassifierFreeGuidance(5.0, 0.75).combine(positive, negative), 0.75 * full + 0.25 * plain
    )


def test_scale_1_is_exactly_conditional_and_skips_the_other_branch():
    batches = []

    def model(noisy, timestep, context, context_mask):
        batches.append(len(noisy))
        return mean_model(noisy, timestep, context, context_mask)

    positive, noisy, timestep = conditioning(3, 5), torch.ones(3, 4, 20), torch.ones(3)
    out = ClassifierFreeGuidance(1.0, 0.75).wrap(model, positive)(noisy, timestep)
    assert torch.equal(out, mean_model(noisy, timestep, positive.context, positive.mask))
    assert batches == [3]


def test_joint_batch_equals_two_calls_with_contexts_of_different_lengths():
    positive, negative = conditioning(3, 5), conditioning(1, 2)
    noisy, timestep = torch.randn(3, 4, 20, generator=torch_generator("joint")), torch.full((3,), 7.0)
    joint = ClassifierFreeGuidance(4.0, 0.5).wrap(mean_model, positive, negative)(noisy, timestep)
    apart = ClassifierFreeGuidance(4.0, 0.5).combine(
        mean_model(noisy, timestep, positive.context, positive.mask),
        mean_model(noisy, timestep, negative.expand(3).context, negative.expand(3).mask),
    )
    torch.testing.assert_close(joint, apart)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 50.0])
def test_guiding_away_from_the_prompt_itself_is_the_conditional_prediction(scale):
    positive, noisy, timestep = conditioning(1, 5), torch.randn(3, 4, 20), torch.ones(3)
    batch = positive.expand(3)
    guided = ClassifierFreeGuidance(scale, 0.5).wrap(mean_model, batch, positive)(noisy, timestep)
    torch.testing.assert_close(guided, mean_model(noisy, timestep, batch.context, batch.mask))


def test_scale_0_is_the_negative_prediction():
    positive, negative = conditioning(2, 5), conditioning(2, 7)
    noisy, timestep = torch.randn(2, 4, 20), torch.ones(2)
    guided = ClassifierFreeGuidance(0.0).wrap(mean_model, positive, negative)(noisy, timestep)
    torch.testing.assert_close(guided, mean_model(noisy, timestep, negative.context, negative.mask))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_known_latent_reaches_every_branch_in_the_order_of_the_items(scale, rows):
    visible, hidden = torch.randn(rows, 4, 20), torch.rand(rows, 20) > 0.5

    def model(noisy, timestep, context, context_mask, visible, hidden_mask):
        return mean_model(noisy, timestep, context, context_mask) + torch.where(hidden_mask[:, None], 7.0, visible)

    positive, negative = conditioning(2, 5), conditioning(1, 2)
    noisy, timestep = torch.randn(2, 4, 20), torch.ones(2)
    guidance = ClassifierFreeGuidance(scale)
    plain = guidance.wrap(mean_model, positive, negative)(noisy, timestep)
    out = guidance.wrap(model, positive, negative, KnownLatent(visible, hidden))(noisy, timestep)
    torch.testing.assert_close(out, plain + torch.where(hidden[:, None], 7.0, visible).expand(2, -1, -1))


@pytest.mark.parametrize("rows", [1, 3])
def test_an_edit_is_rescaled_by_the_spread_of_its_hidden_frames(rows):
    positive, negative = predictions()
    hidden = torch.arange(20).expand(rows, -1) % 3 > torch.arange(rows)[:, None] % 2
    guidance, wild = ClassifierFreeGuidance(5.0, 0.75), torch.full_like(positive, 1e4)
    guided = guidance.combine(*(torch.where(hidden[:, None], part, wild) for part in (positive, negative)), hidden)
    for item, frames in enumerate(hidden.expand(3, -1)):
        alone = guidance.combine(positive[item : item + 1, :, frames], negative[item : item + 1, :, frames])
        torch.testing.assert_close(guided[item : item + 1, :, frames], alone)


def test_what_a_model_says_of_known_frames_reaches_no_hidden_one():
    noisy, timestep, hidden = torch.randn(3, 4, 20), torch.ones(3), (torch.arange(20) > 6)[None]

    def guided(of_known):
        def model(noisy, timestep, context, context_mask, visible, hidden_mask):
            return torch.where(hidden_mask[:, None], mean_model(noisy, timestep, context, context_mask), of_known)

        known = KnownLatent(torch.zeros(1, 4, 20), hidden)
        denoise = ClassifierFreeGuidance(5.0, 0.75).wrap(model, conditioning(3, 5), conditioning(1, 2), known)
        return denoise(noisy, timestep)[..., hidden[0]]

    torch.testing.assert_close(guided(0.0), guided(1e4))


@pytest.mark.parametrize(("scale", "rescale"), [(-1.0, 0.0), (float("nan"), 0.0), (float("inf"), 0.0), (3.0, 1.5)])
def test_impossible_guidance_is_refused(scale, rescale):
    with pytest.raises(ValueError, match="guidance"):
        ClassifierFreeGuidance(scale, rescale)


def test_a_missing_negative_is_refused():
    with pytest.raises(ValueError, match="negative"):
        ClassifierFreeGuidance(3.0).wrap(mean_model, conditioning(1, 2))
