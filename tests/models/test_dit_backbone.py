import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from stirring_parts import stir

from foley.core.components import build_component, load_component, save_component
from foley.core.config import PROJECT_ROOT
from foley.diffusion.guidance import ClassifierFreeGuidance, Conditioning
from foley.diffusion.process import DiffusionProcess
from foley.diffusion.sampler import generate_latents
from foley.diffusion.solver import Solver
from foley.models.dit.llama import LlamaTransformer
from foley.models.dit.model import DiffusionTransformer
from foley.nn.adaln import AdaLN, AdaLNSingle, AdaLNSola, TimeToken

CHANNELS, FRAMES, TOKENS, CONTEXT_DIM = 4, 20, 5, 6
KINDS = {"self_attention", "cross_attention", "feed_forward"}
OFF = {"qk_norm": False, "long_skips": False, "rotary": False, "learned_positions": FRAMES}
VARIANTS = {
    "ezaudio": {"modulation": AdaLNSola(rank=2, alpha=2)},
    "crossdit": {"modulation": AdaLN(), **OFF},
    "pixart": {"modulation": AdaLNSingle(), **OFF},
    "stable_audio": {"modulation": AdaLN(), "long_skips": False},
    "time_token": {"modulation": TimeToken(), "long_skips": False},
    "llama": {},
}


def make_model(variant="ezaudio", randomise=True, **changes):
    """A small model; `randomise` moves every parameter away from its start, so that nothing is hidden by a zero."""
    torch.manual_seed(0)
    options = {"width": 24, "depth": 2, "num_heads": 2, "context_dim": CONTEXT_DIM, **VARIANTS[variant], **changes}
    build = LlamaTransformer if variant == "llama" else DiffusionTransformer
    model = build(latent_channels=CHANNELS, **options).eval()
    if randomise:
        stir(model, 0.2)
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "noisy": torch.randn(2, CHANNELS, FRAMES, generator=generator),
        "timestep": torch.tensor([3, 800]),
        "context": torch.randn(2, TOKENS, CONTEXT_DIM, generator=generator),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_predicts_a_latent_and_trains_every_parameter(variant, inputs):
    model = make_model(variant)
    hidden = torch.zeros(2, FRAMES, dtype=torch.bool)
    hidden[:, 5:12] = True
    prediction = model(**inputs, visible=torch.randn_like(inputs["noisy"]), hidden_mask=hidden)
    assert prediction.shape == inputs["noisy"].shape
    prediction.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_starts_by_predicting_zero_and_ignoring_text(inputs):
    model = make_model(randomise=False)
    assert not model(**inputs).any()
    torch.nn.init.normal_(model.output_layer.conv.weight)
    other = {**inputs, "context": torch.randn(2, TOKENS, CONTEXT_DIM)}
    assert torch.equal(model(**inputs), model(**other))


def test_has_depth_plus_one_blocks_and_long_skips_in_the_second_half():
    model = make_model(depth=4)
    assert (len(model.in_blocks), len(model.out_blocks)) == (2, 2)
    assert all(block.skip is not None for block in model.out_blocks)
    assert model.mid_block.skip is None


def test_each_block_holds_three_cacheable_layers_whose_forward_is_all_they_do(inputs):
    model = make_model()
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "cacheable_kind")}
    blocks = ["in_blocks.0", "mid_block", "out_blocks.0"]
    assert set(layers) == {f"{block}.{kind}" for block in blocks for kind in KINDS}
    assert all(name.endswith(layer.cacheable_kind) for name, layer in layers.items())
    outputs = {}
    handles = [
        layer.register_forward_hook(lambda _m, _i, output, name=name: outputs.__setitem__(name, output))
        for name, layer in layers.items()
    ]
    expected = model(**inputs)
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        layer.forward = lambda *_args, name=name: outputs[name]
    assert torch.equal(model(**inputs), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_full_mask_of_valid_positions_changes_nothing(variant, inputs):
    model = make_model(variant)
    full = model(
        **inputs,
        frame_mask=torch.ones(2, FRAMES, dtype=torch.bool),
        context_mask=torch.ones(2, TOKENS, dtype=torch.bool),
    )
    assert torch.equal(full, model(**inputs))


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_reaches_no_valid_frame_but_the_last(variant, inputs):
    """The output convolution, three frames wide, lets the last valid frame see one padded frame."""
    model, valid = make_model(variant), 12
    frame_mask = (torch.arange(FRAMES) < valid).expand(2, -1)
    masked = model(**inputs, frame_mask=frame_mask)
    short = model(**{**inputs, "noisy": inputs["noisy"][..., :valid]})
    torch.testing.assert_close(masked[..., : valid - 1], short[..., : valid - 1], atol=1e-4, rtol=1e-3)


def test_masked_text_tokens_are_as_if_absent(inputs):
    model = make_model()
    mask = (torch.arange(TOKENS) < 3).expand(2, -1)
    short = model(**{**inputs, "context": inputs["context"][:, :3]})
    torch.testing.assert_close(model(**inputs, context_mask=mask), short, atol=1e-4, rtol=1e-3)


def test_hiding_every_frame_is_the_ordinary_model(inputs):
    model = make_model()
    hidden = torch.ones(2, FRAMES, dtype=torch.bool)
    masked = model(**inputs, visible=torch.randn(2, CHANNELS, FRAMES), hidden_mask=hidden)
    torch.testing.assert_close(masked, model(**inputs))


def test_hidden_frames_of_the_visible_latent_are_not_seen(inputs):
    model, visible = make_model(), torch.randn(2, CHANNELS, FRAMES)
    hidden = torch.zeros(2, FRAMES, dtype=torch.bool)
    hidden[:, :7] = True
    altered = torch.where(hidden[:, None], 100.0, visible)
    first, second = (model(**inputs, visible=v, hidden_mask=hidden) for v in (visible, altered))
    assert torch.equal(first, second)


def test_gradient_checkpointing_changes_neither_output_nor_gradient(inputs):
    plain, frugal = make_model(), make_model(gradient_checkpointing=True)
    for model in (plain, frugal):
        model(**inputs).square().mean().backward()
    for first, second in zip(plain.parameters(), frugal.parameters(), strict=True):
        assert torch.equal(first.grad, second.grad)


def test_stage_one_has_no_text_and_stage_two_adds_only_cross_attention():
    stage_one, stage_two = make_model(context_dim=None).state_dict(), make_model().state_dict()
    assert set(stage_one) < set(stage_two)
    added = set(stage_two) - set(stage_one)
    assert all("cross_attention" in key or "context_embedding" in key for key in added)


def test_stage_two_starts_as_the_stage_one_model(inputs):
    stage_one = make_model(context_dim=None)
    stage_two = make_model(randomise=False)
    stage_two.load_state_dict(stage_one.state_dict(), strict=False)
    expected = stage_one(inputs["noisy"], inputs["timestep"])
    torch.testing.assert_close(stage_two(**inputs), expected, atol=1e-5, rtol=1e-4)


def test_works_under_bfloat16_autocast_and_in_bfloat16(inputs):
    model = make_model()
    expected = model(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(**inputs)
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    pure = model.bfloat16()(**half)
    for output in (mixed, pure):
        torch.testing.assert_close(output.float(), expected, atol=0.1 * float(expected.detach().std()), rtol=0.1)


def test_errors_say_what_to_do(inputs):
    with pytest.raises(ValueError, match="depth must be even"):
        make_model(depth=3)
    with pytest.raises(ValueError, match="give `context`"):
        make_model()(inputs["noisy"], inputs["timestep"])
    with pytest.raises(ValueError, match="needs `hidden_mask"):
        make_model()(**inputs, visible=inputs["noisy"])


@pytest.mark.parametrize("size", sorted(path.stem for path in (PROJECT_ROOT / "configs/size").glob("*.yaml")))
@pytest.mark.parametrize("name", sorted(path.stem for path in (PROJECT_ROOT / "configs/model").glob("*.yaml")))
def test_every_model_config_builds(name, size, tmp_path):
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        composed = compose(overrides=[f"+model={name}", f"+size={size}", "+codec.latent_channels=8", "+text.dim=12"])
    config = OmegaConf.to_container(composed, resolve=True)["model"]
    with torch.device("cpu" if size == "tiny" else "meta"):
        model = build_component(config)
    assert model.latent_channels == 8
    if size == "tiny":
        save_component(model, config, tmp_path / name)
        latent, context = torch.randn(1, 8, 16), torch.randn(1, 3, 12)
        loaded = load_component(tmp_path / name)
        timestep = torch.tensor([500])
        assert torch.equal(loaded(latent, timestep, context), model.eval()(latent, timestep, context))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("editing", [False, True])
def test_hoisting_changes_nothing(variant, editing, inputs):
    model, timesteps = make_model(variant), torch.tensor([999, 800, 3])
    conditions = {
        "context": inputs["context"],
        "context_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool(),
        "frame_mask": (torch.arange(FRAMES) < 15).expand(2, -1),
    }
    if editing:
        conditions["visible"] = torch.randn(2, CHANNELS, FRAMES)
        conditions["hidden_mask"] = (torch.arange(FRAMES) > 6).expand(2, -1)
    run = model.prepare(timesteps, FRAMES, **conditions)
    for timestep in timesteps:
        expected = model(inputs["noisy"], timestep.expand(2), **conditions)
        hoisted = model(inputs["noisy"], timestep.expand(2), run=run)
        torch.testing.assert_close(hoisted, expected, atol=1e-5, rtol=1e-5)


def test_a_hoisted_evaluation_computes_nothing_of_time_and_text_again(inputs):
    model = make_model()
    run = model.prepare(inputs["timestep"], FRAMES, inputs["context"])
    called = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(inputs["noisy"], inputs["timestep"][:1].expand(2), run=run)
    constant = ("modulation", "to_k", "to_v", "norm_context", "time_embedding", "context_embedding", "masked_input")
    in_self_attention = [name for name in called if "self_attention" in name]
    assert any(name.endswith("to_k") for name in in_self_attention)
    assert [n for n in called if n not in in_self_attention and any(part in n for part in constant)] == []


def test_a_model_in_half_precision_takes_and_returns_float32(inputs):
    model = make_model()
    expected = model(**inputs)
    half = model.to(torch.bfloat16)(**inputs)
    assert half.dtype == torch.float32
    assert ((half - expected).norm() / expected.norm()).item() < 0.05


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp_2m"])
def test_a_generation_hoists_and_gives_what_plain_calls_give(solver, inputs, monkeypatch):
    model = make_model()
    positive = Conditioning(inputs["context"], torch.ones(2, TOKENS, dtype=torch.bool))
    negative = Conditioning(torch.randn(1, 2, CONTEXT_DIM), torch.ones(1, 2, dtype=torch.bool))
    guidance = ClassifierFreeGuidance(5.0, 0.75)

    def generate():
        return generate_latents(
            model, DiffusionProcess(), positive, negative, [0, 1], FRAMES, guidance, Solver(solver, 4)
        )

    hoisted = generate()
    # A denoiser without `prepare` is called with everything at each evaluation.
    monkeypatch.setattr(DiffusionTransformer, "prepare", None)
    torch.testing.assert_close(hoisted, generate(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_guidance_embedding_hoists_one_scale_for_all_or_one_per_item(variant, inputs):
    model, timesteps = make_model(variant, guidance_embedding=True), torch.tensor([999, 499])
    for scale in (torch.tensor([5.0, 9.0]), torch.tensor([7.0])):
        run = model.prepare(timesteps, FRAMES, inputs["context"], guidance_scale=scale)
        for timestep in timesteps:
            plain = {**inputs, "timestep": timestep.expand(2)}
            expected = model(**plain, guidance_scale=scale)
            hoisted = model(inputs["noisy"], timestep.expand(2), run=run)
            torch.testing.assert_close(hoisted, expected, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(expected, model(**plain, guidance_scale=scale + 1), atol=1e-4)


def test_a_student_begins_as_its_teacher(inputs):
    teacher, student = make_model(), make_model(guidance_embedding=True, randomise=False)
    loaded = student.load_state_dict(teacher.state_dict(), strict=False)
    assert loaded.missing_keys == ["guidance_embedding.projection.weight", "guidance_embedding.projection.bias"]
    assert torch.equal(student(**inputs, guidance_scale=torch.tensor([5.0, 13.0])), teacher(**inputs))


def test_only_a_student_takes_a_guidance_scale_and_it_needs_one(inputs):
    with pytest.raises(ValueError, match="give `guidance_scale"):
        make_model(guidance_embedding=True)(**inputs)
    with pytest.raises(ValueError, match="does not embed a guidance scale"):
        make_model()(**inputs, guidance_scale=torch.tensor([5.0]))


def test_a_timestep_that_was_not_prepared_for_is_refused(inputs):
    model = make_model()
    run = model.prepare(torch.tensor([999, 3]), FRAMES, inputs["context"])
    for timestep in (torch.tensor([500, 500]), torch.tensor([999, 3])):
        with pytest.raises(ValueError, match="not one of the 2"):
            model(inputs["noisy"], timestep, run=run)


def test_a_length_embedding_counts_valid_frames_and_leaves_a_model_as_it_was(inputs):
    told, plain = (make_model(randomise=False, length_embedding=told) for told in (True, False))
    missing, _ = told.load_state_dict(make_model().state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing} == {"length_embedding"}
    plain.load_state_dict(make_model().state_dict())
    assert torch.equal(told(**inputs), plain(**inputs))
    torch.nn.init.normal_(told.length_embedding.projection.weight)
    whole = told(**inputs)
    assert not torch.allclose(whole, plain(**inputs), atol=1e-3)
    # Of two clips padded to one length, each is what it is alone.
    valid = torch.arange(FRAMES) < torch.tensor([[FRAMES], [12]])
    alone = {name: value[1:, ..., :12] if name == "noisy" else value[1:] for name, value in inputs.items()}
    padded = told(**inputs, frame_mask=valid)
    torch.testing.assert_close(padded[0], whole[0])
    torch.testing.assert_close(padded[1, :, :11], told(**alone)[0, :, :11])  # the last hears its padded neighbour


def test_a_length_embedding_is_prepared_for_the_length_of_the_latent(inputs):
    told = make_model(length_embedding=True)
    run = told.prepare(torch.tensor([800, 3]), FRAMES, context=inputs["context"])
    now = {**inputs, "timestep": torch.tensor([800, 800])}
    torch.testing.assert_close(told(now["noisy"], now["timestep"], run=run), told(**now))
    with pytest.raises(ValueError, match="length_embedding prepares"):
        told.prepare(torch.tensor([800]), FRAMES, frame_mask=torch.ones(2, FRAMES, dtype=torch.bool))
