"""What a room exports is what its users import: the lists are held here, so that a name does not vanish unnoticed."""

import importlib

import pytest

PUBLIC = {
    "foley.accel": """
        AudioCache Budget CacheSchedule Calibration CalibrationRecorder Combined CostMeter Fora LayerCache LiteFocus
        LocalGlobal NoAcceleration PredictionReuse SmoothCache TokenMerging
        DBCache FirstBlockCache MagCache TeaCache accelerate calibrate
    """,
    "foley.models": """
        AdaptedDenoiser AudioVAE BigVGAN ControlledTransformer DiffusionTransformer FastDecoder FeatureConditioner
        FrozenT5Conditioner GaussianPosterior LatentNormaliser LlamaTransformer MelCodec MelSpectrogram
        MelVAE SmallTextEncoder SpanMask
        SpectralVAE TextConditioner TextEmbedding WaveformVAE
    """,
    "foley.diffusion": """
        PREDICTIONS SOLVERS Accelerator ClassifierFreeGuidance Conditioning Consistency ConsistencySolver
        DiffusionProcess EmbeddedGuidance IntervalGuidance KnownLatent ProjectedGuidance RunContext SamplerCallback
        Solver Start StepContext Windows default_solver embed generate_latents sample
    """,
    "foley.metrics": """
        Accuracy ClipFeatures ClipFile Estimate Evaluation EvaluationProtocol Judge LabelledAudio Latency PairingError
        ProtocolError SilentAudioError evaluate_audio evaluate_features evaluate_files extract_audio extract_files
        extrapolated_distance frechet_distance gaussian_frechet_distance inception_scores kernel_audio_distance
        kl_sigmoid kl_softmax load_protocol measure_latency measure_rounds mel_distance read_clips scan_directory si_sdr
        stft_distance
    """,
}


@pytest.mark.parametrize("room", PUBLIC)
def test_a_room_exports_what_users_import(room):
    module = importlib.import_module(room)
    assert set(module.__all__) == set(PUBLIC[room].split())
    assert [name for name in module.__all__ if getattr(module, name).__doc__ is None] == []
