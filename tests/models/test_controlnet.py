"""EzAudio's ControlNet: its energy curve, its copy, what it adds, and the published layout."""

import math

import pytest
import torch
from stirring_parts import stir

from foley.core.components import build_component
from foley.core.seeding import torch_generator
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver
from foley.models.dit.controlnet import (
    ControlEmbedding,
    ControlledTransformer,
    controlled_config,
    energy_curve,
    parted_config,
)
from foley.nn.adaln import AdaLN, AdaLNSola, TimeToken

SIZES = {"latent_channels": 4, "width": 16, "depth": 4, "num_heads": 2, "context_dim": 6}
HOP, FRAMES = 240, 20


def model(**options) -> ControlledTransformer:
    """With no weight at zero but those of the ControlNet."""
    torch.manual_seed(0)
    built = ControlledTransformer(**SIZES, **{"modulation": AdaLNSola(rank=2, alpha=2), **options})
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if not name.startswith("control."):
                parameter.add_(0.1 * torch.randn_like(parameter))
    built.copy_model()
    return built.eval()


def trained(**options) -> ControlledTransformer:
    built = model(**options)
    stir(built.control)
    return built


def inputs(size: int = 2) -> dict[str, torch.Tensor]:
    drawn = torch_generator("inputs")
    noisy = torch.randn(size, 4, FRAMES, generator=drawn)
    times = torch.full((size,), 500)
    return {"noisy": noisy, "timestep": times, "context": torch.randn(size, 3, 6, generator=drawn)}


def curves(size: int = 2) -> torch.Tensor:
    return torch.rand(size, 1, 2 * FRAMES, generator=torch_generator("curve"))


# ---------------------------------------------------------------- the energy


def test_the_energy_is_that_of_closed_forms() -> None:
    """A tone of two loudnesses: 0 dB of power and -30 dB of it lie at 1 and at the middle of 60 dB."""
    tone = torch.sin(2 * math.pi * 1000 / 24000 * torch.arange(24000))
    tone[12000:] *= 10 ** (-30 / 20)
    curve = energy_curve(tone[None], HOP)[0, 0]
    assert curve.shape == (100,)
    loud, quiet = (10 * math.log10(power) for power in (0.5, 0.5e-3))  # half is a sine's power
    torch.testing.assert_close(curve[5:45], torch.ones(40), atol=2e-3, rtol=0)
    torch.testing.assert_close(curve[55:95], torch.full((40,), (quiet + 60) / (loud + 60)), atol=2e-3, rtol=0)


def test_the_window_is_of_eight_hops_centred_on_its_own() -> None:
    """A single sample is heard by the eight windows that it lies in; a power of 1 / 1920 is the mean of its square."""
    click = torch.zeros(1, 9600)
    click[0, 20 * HOP + HOP // 2] = 1.0
    heard = energy_curve(click, HOP)[0, 0].nonzero().flatten().tolist()
    # Window i begins at 240 i - 840 and ends before 240 i + 1080.
    assert heard == [index for index in range(40) if HOP * index - 840 <= 20 * HOP + HOP // 2 < HOP * index + 1080]


def test_the_energy_knows_no_level_and_is_silent_of_silence() -> None:
    audio = torch.randn(2, 4800, generator=torch_generator("audio"))
    torch.testing.assert_close(energy_curve(audio, HOP), energy_curve(1e-3 * audio, HOP))
    assert not energy_curve(torch.zeros(1, 4800), HOP).any()
    assert energy_curve(audio[:, :300], HOP).shape == (2, 1, 1)  # shorter than half a window


def test_the_curve_has_as_many_values_as_the_frames_want() -> None:
    built = model(control_widths=(8, 16, 24))
    assert built.curve(torch.randn(1, 480 * FRAMES), 480).shape == (1, 1, 4 * FRAMES)
    with pytest.raises(ValueError, match="control has 39 values; 20 latent frames want 80"):
        built(**inputs(1), control=torch.rand(1, 1, 39))


# ---------------------------------------------------------------- the copy


@pytest.mark.parametrize("scheme", [AdaLNSola(rank=2, alpha=2), AdaLN()])
@torch.no_grad()
def test_it_begins_as_the_model_bit_by_bit(scheme) -> None:
    built = model(modulation=scheme)
    config = {"_target_": "foley.models.dit.model.DiffusionTransformer", **SIZES}
    named = {"_target_": f"foley.nn.adaln.{type(scheme).__name__}"}
    named |= {"rank": 2, "alpha": 2} if isinstance(scheme, AdaLNSola) else {}
    alone = build_component({**config, "modulation": named}).eval()
    alone.load_state_dict({k: v for k, v in built.state_dict().items() if not k.startswith("control.")})
    expected = alone(**inputs())
    assert torch.equal(built(**inputs()), expected)
    assert torch.equal(built(**inputs(), control=curves()), expected)
    own, copied = built.state_dict(), built.control.state_dict()
    shared = [name for name in copied if not name.startswith(("embedding.", "projections."))]
    assert all(torch.equal(copied[name], own[name]) for name in shared)
    assert len(shared) == len(copied) - 9 - 4  # of the embedding and of two projections


@torch.no_grad()
def test_what_it_adds_is_projected_from_the_copied_blocks() -> None:
    """The definition, written out: h_0 = project + E, h_i = block(h_{i-1}), skip_i + scale Z_i h_i."""
    built, given, curve = trained(), inputs(), curves()
    conditions = built.condition(given["timestep"], FRAMES, given["context"], control=curve)
    copy, own = built.control, conditions.blocks[-2:]
    channels = torch.cat([given["noisy"].transpose(1, 2), built.masked_input(None, None).expand(2, FRAMES, -1)], dim=-1)
    h = copy.input_projection(channels) + copy.embedding(curve)
    expected = []
    for block, projection, block_inputs in zip(copy.in_blocks, copy.projections, own, strict=True):
        h = block(h, block_inputs)
        expected.append(projection(h))
    torch.testing.assert_close(built._additions(given["noisy"], conditions), expected)
    doubled = built.condition(
        given["timestep"], FRAMES, given["context"], control=curve, control_scale=torch.tensor([2.0, 0.0])
    )
    for twice, once in zip(built._additions(given["noisy"], doubled), expected, strict=True):
        torch.testing.assert_close(twice, once * torch.tensor([2.0, 0.0])[:, None, None])
    plain, controlled = built(**given), built(**given, control=curve)
    assert not torch.allclose(plain, controlled, atol=1e-3)
    scaled = built(**given, control=curve, control_scale=torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(scaled[0], controlled[0])
    assert torch.equal(scaled[1], plain[1])


@torch.no_grad()
def test_hidden_values_change_nothing() -> None:
    embedding = ControlEmbedding(1, (4, 8), 6)
    torch.nn.init.normal_(embedding.output.weight)
    curve, hidden = curves(), torch.zeros(2, 2 * FRAMES, dtype=torch.bool)
    hidden[:, 10:20] = True
    other = torch.where(hidden[:, None], torch.rand_like(curve), curve)
    assert torch.equal(embedding(curve, hidden), embedding(other, hidden))
    assert not torch.equal(embedding(curve, hidden), embedding(curve))


@torch.no_grad()
def test_what_a_run_prepares_is_what_each_evaluation_computes() -> None:
    built, given, curve = trained(), inputs(), curves()
    more = {"control": curve, "control_scale": torch.tensor([1.0, 0.5])}
    run = built.prepare(torch.tensor([900, 500]), FRAMES, given["context"], **more)
    torch.testing.assert_close(built(given["noisy"], given["timestep"], run=run), built(**given, **more))


def test_the_published_parts_train_and_gradients_reach_them() -> None:
    built = trained().requires_grad_(False)
    for parameter in built.control.trained():
        parameter.requires_grad_(True)
    names = {name.split(".")[1] for name, parameter in built.named_parameters() if parameter.requires_grad}
    assert names == {"embedding", "in_blocks", "projections"}
    built(**inputs(), control=curves(), control_hidden=curves()[:, 0] > 0.5).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in built.control.trained())


def test_a_model_without_long_skips_has_nothing_to_add_to() -> None:
    for options in ({"long_skips": False}, {"modulation": TimeToken()}):
        with pytest.raises(ValueError, match="a ControlNet adds to long skips"):
            ControlledTransformer(**SIZES, **{"modulation": AdaLN(), **options})


def test_its_config_is_the_models_and_comes_apart_again() -> None:
    plain = {"_target_": "foley.models.dit.model.DiffusionTransformer", **SIZES, "modulation": {}}
    config = controlled_config(plain)
    assert controlled_config(config) == config
    base, copy = parted_config(config)
    assert base == plain
    assert (copy["model"], copy["channels"], copy["widths"]) == (plain, 1, [64, 128])


@torch.no_grad()
def test_both_branches_of_guidance_follow_it() -> None:
    built = trained()
    text, empty = (Conditioning(torch.randn(1, 3, 6), torch.ones(1, 3, dtype=torch.bool)) for _ in range(2))

    def generate(**more: torch.Tensor) -> torch.Tensor:
        common = built, DiffusionProcess("v"), text.expand(2), empty, [0, 1], FRAMES
        return generate_latents(*common, ClassifierFreeGuidance(3.0), Solver("ddim", 3), more=more)

    followed = generate(control=curves(1), control_scale=torch.ones(1))
    assert not torch.allclose(followed, generate(), atol=1e-3)
    assert torch.equal(generate(control=curves(1), control_scale=torch.zeros(1)), generate())
