"""The whole path from prompts to audio, with untrained weights."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from recorded_graphs import RecordedGraphs
from small_system import CONFIGS, STEPS, CountingAccelerator, training_checkpoint
from stirring_parts import stir

from foley.accel import quantisation
from foley.core.components import CheckpointError
from foley.core.config import PROJECT_ROOT
from foley.core.hashing import hash_module
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation import text_to_audio
from foley.generation.options import MAX_PROMPT_CHARACTERS
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import build_system, load_system, save_system


@pytest.fixture(scope="module")
def system():
    torch.manual_seed(0)
    built = build_system(CONFIGS)
    stir(built.modules["denoiser"])  # zero-initialised layers would hide the text and the time
    built.modules["normaliser"].set(torch.ones(4), torch.full((4,), 2.0))
    return built


@pytest.fixture(scope="module")
def pipeline(system):
    return TextToAudio(system, max_duration_seconds=5.0)


def test_audio_has_exactly_the_requested_length(pipeline):
    for seconds, samples in [(0.5, 1000), (0.0507, 101), (0.0001, 1)]:
        result = pipeline.generate(["rain"], seconds, num_steps=2)
        assert result.audio.shape == (1, 1, samples)
        assert result.audio.isfinite().all()


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m_sde", "heun"])
def test_an_item_is_the_same_alone_and_in_a_batch(pipeline, solver):
    prompts = ["a dog barks", "rain on a tin roof while someone speaks", "", "a bell"]
    together = pipeline.generate(prompts, seeds=[5, 6, 7, 8], solver=solver, **STEPS)
    in_pairs = pipeline.generate(prompts, seeds=[5, 6, 7, 8], solver=solver, batch_size=2, **STEPS)
    alone = pipeline.generate(prompts[2:3], seeds=[7], solver=solver, **STEPS)
    torch.testing.assert_close(together.audio, in_pairs.audio, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(together.audio[2:3], alone.audio, atol=1e-4, rtol=1e-3)


def test_two_generations_in_a_row_are_equal_and_the_model_unchanged(pipeline):
    before = hash_module(pipeline.denoiser)
    first, second = (pipeline.generate(["rain"], seeds=[1], **STEPS) for _ in range(2))
    assert torch.equal(first.audio, second.audio)
    assert hash_module(pipeline.denoiser) == before


def test_prompt_seed_and_guidance_matter(pipeline):
    base = pipeline.generate(["rain"], seeds=[1], **STEPS).audio
    for change in (
        pipeline.generate(["a dog"], seeds=[1], **STEPS),
        pipeline.generate(["rain"], seeds=[2], **STEPS),
        pipeline.generate(["rain"], seeds=[1], guidance=ClassifierFreeGuidance(5.0), **STEPS),
        pipeline.generate(["rain"], seeds=[1], negative_prompt="speech", **STEPS),
    ):
        assert not torch.allclose(base, change.audio, atol=1e-5)


def test_guiding_the_empty_prompt_away_from_itself_changes_nothing(pipeline):
    plain = pipeline.generate([""], guidance=ClassifierFreeGuidance(1.0), **STEPS)
    guided = pipeline.generate([""], guidance=ClassifierFreeGuidance(7.0), **STEPS)
    torch.testing.assert_close(plain.audio, guided.audio, atol=1e-4, rtol=1e-3)


def test_the_accelerator_is_attached_for_each_run_and_detached_after(pipeline):
    accelerator = CountingAccelerator()
    accelerated = pipeline.generate(["a", "b", "c"], batch_size=2, accelerator=accelerator, **STEPS)
    assert (accelerator.evaluations, accelerator.ended, accelerator.attached) == (8, 2, [])
    assert torch.equal(accelerated.audio, pipeline.generate(["a", "b", "c"], batch_size=2, **STEPS).audio)


def test_an_error_inside_a_run_detaches_too(pipeline):
    accelerator = CountingAccelerator(fail=True)
    with pytest.raises(RuntimeError, match="inside a cached generation"):
        pipeline.generate(["a"], accelerator=accelerator, **STEPS)
    assert (accelerator.ended, accelerator.attached) == (1, [])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["x" * 2**20]}, "1048576 characters"),
        ({"negative_prompt": "x" * (MAX_PROMPT_CHARACTERS + 1)}, "characters"),
        ({"duration_seconds": 1e9}, "at most 5.0"),
        ({"duration_seconds": 0}, "duration_seconds=.*: give a number"),
        ({"duration_seconds": float("nan")}, "duration_seconds=.*: give a number"),
        ({"num_steps": 0}, "whole number >= 1"),
        ({"solver": "magic"}, "unknown solver"),
        ({"solver": "euler_flow"}, "cannot sample a model that predicts 'v'"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_impossible_requests_are_refused(pipeline, request_, message):
    with pytest.raises(ValueError, match=message):
        pipeline.generate(**({"prompts": ["rain"]} | request_))


def test_audio_that_is_not_finite_is_refused(system):
    broken = TextToAudio(build_system(CONFIGS))
    broken.normaliser.mean.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        broken.generate(["rain"], **STEPS)


def test_a_saved_system_generates_the_same(pipeline, tmp_path):
    pipeline.save(tmp_path / "system")
    loaded = TextToAudio.load(tmp_path / "system")
    assert loaded.model_hash == pipeline.model_hash
    assert torch.equal(
        pipeline.generate(["rain"], **STEPS).audio,
        loaded.generate(["rain"], **STEPS).audio,
    )
    moved = (tmp_path / "system").rename(tmp_path / "moved")
    TextToAudio.load(moved).save(tmp_path / "again", torch.float16)
    half = TextToAudio.load(tmp_path / "again").generate(["rain"], **STEPS)
    torch.testing.assert_close(half.audio, pipeline.generate(["rain"], **STEPS).audio, atol=0.05, rtol=0.1)


def test_a_damaged_system_is_refused(system, tmp_path):
    with pytest.raises(CheckpointError, match="not an exported system"):
        load_system(tmp_path)
    save_system(system, tmp_path)
    (tmp_path / "codec" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="codec"):
        load_system(tmp_path)


def test_a_system_from_a_stranger_builds_nothing_foreign(system, tmp_path):
    save_system(system, tmp_path)
    file = tmp_path / "system.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(info | {"process": {"_target_": "os.system", "command": "true"}}))
    with pytest.raises(CheckpointError, match="refusing to build"):
        load_system(tmp_path)


def test_a_training_checkpoint_generates_with_the_codec_it_names(pipeline, system, tmp_path):
    path = training_checkpoint(system, tmp_path, hash_module(system.modules["codec"]))
    loaded = TextToAudio.load(path)
    assert torch.equal(
        pipeline.generate(["rain"], **STEPS).audio,
        loaded.generate(["rain"], **STEPS).audio,
    )
    loaded.save(tmp_path / "system")
    assert load_system(tmp_path / "system").configs["codec"]["sample_rate_hz"] == 2000


def test_another_codec_than_the_one_trained_on_is_refused(system, tmp_path):
    with pytest.raises(CheckpointError, match="was trained on latents of the codec abc"):
        TextToAudio.load(training_checkpoint(system, tmp_path, "abc"))


def test_windows_make_a_long_clip_of_the_requested_length(pipeline):
    long = pipeline.generate(["rain"], 2.0, num_steps=3, window_seconds=0.5, overlap_seconds=0.1)
    assert long.audio.shape == (1, 1, 4000)
    assert long.settings["window_seconds"] == 0.5
    whole, windowed = (
        pipeline.generate(["rain"], num_steps=3, duration_seconds=0.5, window_seconds=w) for w in (None, 1.0)
    )
    assert torch.equal(whole.audio, windowed.audio)  # no longer than a window


def test_an_overlap_as_long_as_the_window_is_refused(pipeline):
    with pytest.raises(ValueError, match="overlap must be shorter"):
        pipeline.generate(["rain"], 2.0, num_steps=2, window_seconds=0.5, overlap_seconds=0.5)


def test_a_rotary_extension_changes_long_clips_alone(system):
    plain, extended = TextToAudio(system), TextToAudio(system)
    short, long = (plain.generate(["rain"], seconds, num_steps=3).audio for seconds in (0.5, 1.0))
    extended.extend_rotary("ntk", 0.5)
    try:
        assert torch.equal(extended.generate(["rain"], 0.5, num_steps=3).audio, short)
        assert not torch.allclose(extended.generate(["rain"], 1.0, num_steps=3).audio, long)
    finally:
        system.modules["denoiser"].rotary.extension = None


def test_half_precision_is_recorded_and_counts_as_the_same_model():
    pipeline = TextToAudio(build_system(CONFIGS))
    digest = pipeline.model_hash
    pipeline.optimise("bf16")
    assert pipeline.generate(["rain"], **STEPS).settings["precision"] == "bf16"
    assert hash_module(pipeline.denoiser) == digest


def test_rounded_weights_are_not_taken_for_exact_ones(tmp_path):
    pipeline = TextToAudio(build_system(CONFIGS))
    pipeline.optimise("float32")
    pipeline.optimise("bf16")
    pipeline.optimise("bf16")
    with pytest.raises(ValueError, match=r"precision=float32: the denoiser's weights are rounded to bf16"):
        pipeline.optimise("float32")
    with pytest.raises(ValueError, match=r"save: .* load the system again"):
        pipeline.save(tmp_path)
    assert not any(tmp_path.iterdir())


def make_generator():
    torch.manual_seed(0)
    return TextToAudio(build_system(CONFIGS))


def test_the_first_generation_chooses_the_precision_and_graphs_of_its_device(monkeypatch):
    """On CUDA bf16 and recordings: here with a recorder of the CPU, at a device that only says it is one."""
    recorders = []
    monkeypatch.setattr(text_to_audio, "choose_precision", lambda precision, device: "bf16")
    monkeypatch.setattr(text_to_audio, "choose_graphs", lambda wanted, device: True)
    monkeypatch.setattr(text_to_audio, "CudaRecorder", lambda: recorders.append(RecordedGraphs()) or recorders[-1])
    recorded = make_generator().generate(["rain", "wind"], 0.3, num_steps=5, batch_size=1)
    expected = {"precision": "bf16", "cuda_graphs": True, "decoder_precision": "float32"}
    assert expected.items() <= recorded.settings.items()
    assert [recorder.count for recorder in recorders] == [1, 1]  # of each batch
    monkeypatch.undo()
    plain = make_generator()
    plain.optimise("bf16")
    assert torch.equal(recorded.audio, plain.generate(["rain", "wind"], 0.3, num_steps=5, batch_size=1).audio)
    with pytest.raises(ValueError, match="cuda_graphs=true: device=cpu has none"):
        plain.optimise(cuda_graphs=True)


def test_text_is_as_exact_as_the_precision_that_was_asked_for(system, monkeypatch):
    told = []
    monkeypatch.setattr(system.modules["text"], "compute_exactly", told.append)
    monkeypatch.setattr(quantisation, "set_precision", lambda denoiser, precision: None)
    for precision in ("bf16", "float32", "fp16"):
        TextToAudio(system).optimise(precision)
    assert told == [False, True, False]


def test_all_that_was_done_to_the_denoiser_is_recorded():
    pipeline = TextToAudio(build_system(CONFIGS))
    pipeline.extend_rotary("linear", 0.3)
    settings = pipeline.generate(["rain"], **STEPS).settings
    expected = {"precision": "float32", "compile": False, "rotary_extension": "linear", "trained_seconds": 0.3}
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize("modulation", ["AdaLN", "TimeToken"])
def test_a_rotary_extension_leaves_clips_of_the_trained_length_alone(modulation):
    """0.507 s are 25.35 frames, for which 26 are made; a time token is one position more."""
    scheme = {"_target_": f"foley.nn.adaln.{modulation}"}
    pipeline = TextToAudio(build_system({**CONFIGS, "denoiser": {**CONFIGS["denoiser"], "modulation": scheme}}))
    pipeline.extend_rotary("ntk", 0.507)
    positions = 26 + (modulation == "TimeToken")
    assert pipeline.denoiser.rotary.extension.trained_length == positions
    stir(pipeline.denoiser)
    extended = [pipeline.generate(["rain"], seconds, num_steps=2).audio for seconds in (0.507, 0.53)]
    pipeline.denoiser.rotary.extension = None
    plain = [pipeline.generate(["rain"], seconds, num_steps=2).audio for seconds in (0.507, 0.53)]
    assert torch.equal(extended[0], plain[0])
    assert not torch.equal(extended[1], plain[1])


VARIANTS = sorted(file.stem for file in (PROJECT_ROOT / "configs" / "model").glob("*.yaml"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_denoiser_makes_80_seconds(variant, caplog):
    """At 10 frames per second, of which the learned positions reach over 50 s."""
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        sizes = ["width=16", "depth=2", "num_heads=2", "latent_channels=4", "context_dim=16"]
        model = compose("train", overrides=[f"model={variant}", *(f"model.{size}" for size in sizes)]).model
    denoiser = OmegaConf.to_container(model, resolve=True)
    codec = {**CONFIGS["codec"], "channels": 1, "sample_rate_hz": 400}
    pipeline = TextToAudio(build_system({**CONFIGS, "denoiser": denoiser, "codec": codec}), max_duration_seconds=80.0)
    caplog.set_level("INFO", "foley.generation.settings")
    result = pipeline.generate(["rain"], 80.0, num_steps=1)
    assert result.audio.shape == (1, 1, 32000)
    learned = pipeline.denoiser.positions is not None
    assert result.settings.get("window_seconds") == (50.0 if learned else None)
    assert ("800 frames exceed the 500 learned positions" in caplog.text) == learned
    if learned:
        with pytest.raises(ValueError, match=r"600 frames exceed the 500 learned positions.*window_seconds="):
            pipeline.generate(["rain"], 80.0, num_steps=1, window_seconds=60.0)


def test_each_prompt_is_encoded_once(system):
    pipeline, encoded = TextToAudio(system), []
    hook = system.modules["text"].register_forward_pre_hook(lambda _, arguments: encoded.extend(arguments[0]))
    pipeline.generate(["rain", "rain", "a dog"], **STEPS)
    pipeline.generate(["a dog", ""], **STEPS)
    assert encoded == ["", "rain", "a dog"]
    pipeline.forget_prompts()
    pipeline.generate(["rain"], **STEPS)
    hook.remove()
    assert encoded[3:] == ["", "rain"]


def test_compiled_denoisers_meet_few_lengths_of_text(system, monkeypatch):
    monkeypatch.setattr("foley.generation.backends.compile_blocks", lambda denoiser: None)
    monkeypatch.setattr(system.modules["text"], "length_multiple", 1)
    pipeline = TextToAudio(system)
    assert pipeline._encode_text(["rain"]).mask.shape[1] < 16
    pipeline.optimise(compiled=True)
    assert {pipeline._encode_text([prompt]).mask.shape[1] for prompt in ("rain", "a dog barks", "")} == {16}


def test_long_audio_is_decoded_in_chunks_that_change_nothing(pipeline):
    whole = pipeline.generate(["rain"], decode_chunk_seconds=None, **STEPS)
    chunks = pipeline.generate(["rain"], decode_chunk_seconds=0.1, **STEPS)
    torch.testing.assert_close(chunks.audio, whole.audio, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="decode_chunk_seconds=0: give a number > 0"):
        pipeline.generate(["rain"], decode_chunk_seconds=0)


def test_the_decoder_in_half_precision(system, tmp_path):
    pipeline = TextToAudio(system)
    exact = pipeline.generate(["rain"], **STEPS)
    pipeline.set_decoder_precision("bf16")
    rounded = pipeline.generate(["rain"], **STEPS)
    assert rounded.settings["decoder_precision"] == "bf16"
    assert 0 < (rounded.audio - exact.audio).norm() / exact.audio.norm() < 0.1
    pipeline.save(tmp_path)
    assert hash_module(load_system(tmp_path).modules["codec"]) == hash_module(system.modules["codec"])
    with pytest.raises(ValueError, match="SmallTextEncoder is not a frozen encoder"):
        pipeline.keep_text_embeddings(tmp_path)


@pytest.mark.parametrize(("spread", "warnings"), [(1.5, 0), (5.0, 1)])
def test_a_solver_that_blew_up_is_warned_of_by_name(pipeline, monkeypatch, caplog, spread, warnings):
    def blown_up(*args, seeds, num_frames, **kwargs):
        return spread * torch.randn(len(seeds), 4, num_frames, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr("foley.generation.text_to_audio.generate_latents", blown_up)
    pipeline.generate(["rain", "wind"], **STEPS)
    messages = [record.getMessage() for record in caplog.records if "blew up" in record.getMessage()]
    assert len(messages) == warnings
    assert all("solver ddim blew up in 2 of 2 clips: latents of standard deviation 5." in text for text in messages)


def test_heun_in_few_steps_does_not_blow_up(caplog):
    generator = TextToAudio.load()
    peaks = [
        float(generator.generate(["dog barks"], 0.5, solver="heun", num_steps=steps).audio.abs().max())
        for steps in (2, 5)
    ]
    assert max(peaks) < 6  # 24 and 15 on a grid that ends at the smallest sigma
    assert not [record for record in caplog.records if "blew up" in record.getMessage()]


def test_a_clip_neither_begins_nor_ends_with_a_jump(pipeline):
    bare, faded = (pipeline.generate(["rain"], 0.5, fade_seconds=seconds, num_steps=2).audio for seconds in (0, 0.005))
    length = round(0.005 * pipeline.sample_rate_hz)
    ramp = torch.sin(torch.pi / 2 * (torch.arange(length) + 0.5) / length).square()
    torch.testing.assert_close(faded[..., :length], bare[..., :length] * ramp)
    torch.testing.assert_close(faded[..., -length:], bare[..., -length:] * ramp.flip(0))
    assert torch.equal(faded[..., length:-length], bare[..., length:-length])
    assert GenerationSettings(fade_seconds=1).finish(bare[..., :3], 1000).shape == bare[..., :3].shape
