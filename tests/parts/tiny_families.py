"""Small random pipelines of the newer families, built from diffusers' own classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
    AceStepPipeline,
    AceStepTransformer1DModel,
    AudioLDMPipeline,
    AutoencoderKL,
    AutoencoderOobleck,
    AutoencoderSAME,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
    MusicLDMPipeline,
    StableAudio3DiTModel,
    StableAudio3DurationEmbedder,
    StableAudio3Pipeline,
    UNet2DConditionModel,
)
from tiny_pipelines import clap, roberta_tokenizer, t5, t5_tokenizer, vocoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    ClapFeatureExtractor,
    ClapTextConfig,
    ClapTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5GemmaConfig,
    T5GemmaEncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from foley.system.published.tangoflux import TangoFluxConditioner, TangoFluxPipeline

RATE_HZ = 800
ACE_STEP_RATE_HZ = 160


def audible(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """In eval mode, with what starts at zero drawn at random, so that every layer does something."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=scale, generator=generator)
    return module.eval()


def stable_audio_3(stochastic: bool = True) -> StableAudio3Pipeline:
    """8 samples a frame, at most 4 s."""
    torch.manual_seed(0)
    vae = AutoencoderSAME(
        patch_size=4, encoder_channels=8, encoder_c_mults=[2], encoder_strides=[2], encoder_transformer_depths=[1],
        latent_dim=4, dim_heads=8, sampling_rate=RATE_HZ,
    )  # fmt: skip
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    gemma = {**sizes, "num_attention_heads": 2, "num_key_value_heads": 1}
    text = T5GemmaEncoderModel(T5GemmaConfig(encoder=gemma, decoder=gemma, is_encoder_decoder=False))
    transformer = StableAudio3DiTModel(
        io_channels=4, embed_dim=32, depth=2, num_heads=2, cond_token_dim=16, global_cond_dim=16,
        local_add_cond_dim=5, timestep_features_dim=8, num_memory_tokens=2,
    )  # fmt: skip
    duration = StableAudio3DurationEmbedder(output_dim=16, fourier_dim=8, max_val=4.0)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, stochastic_sampling=stochastic)
    return StableAudio3Pipeline(audible(vae), text.eval(), bytes_tokenizer(), duration, audible(transformer), scheduler)


def ace_step(turbo: bool = False) -> AceStepPipeline:
    """8 samples a frame, at few frames a second: of timbre it hears 30 s."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8}
    sizes = {"hidden_size": 16, "intermediate_size": 16, **heads}
    text = Qwen3Config(vocab_size=300, num_hidden_layers=1, **{**heads, "hidden_size": 16, "intermediate_size": 16})
    condition = AceStepConditionEncoder(
        text_hidden_dim=16, timbre_hidden_dim=4, num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1, **sizes,
    )  # fmt: skip
    condition.silence_latent = torch.randn(1, 15_000, 4)
    transformer = AceStepTransformer1DModel(
        num_hidden_layers=2, in_channels=12, audio_acoustic_hidden_dim=4, is_turbo=turbo, **sizes
    )
    tokens = {"audio_acoustic_hidden_dim": 4, "num_attention_pooler_hidden_layers": 1, **sizes}
    tokenizer = AceStepAudioTokenizer(fsq_dim=16, fsq_input_levels=[8, 5], **tokens)
    return AceStepPipeline(
        _oobleck(sampling_rate=ACE_STEP_RATE_HZ),
        Qwen3Model(text).eval(),
        bytes_tokenizer(),
        audible(transformer),
        condition.eval(),
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
        tokenizer.eval(),
        AceStepAudioTokenDetokenizer(**tokens).eval(),
    )


def longcat() -> LongCatAudioDiTPipeline:
    """8 samples a frame."""
    torch.manual_seed(0)
    vae = LongCatAudioDiTVae(
        channels=8, c_mults=[1, 2], strides=[2, 4], latent_dim=4, encoder_latent_dim=8, downsampling_ratio=8,
        sample_rate=RATE_HZ,
    )  # fmt: skip
    text = UMT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = LongCatAudioDiTTransformer(dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=16, latent_dim=4)
    return LongCatAudioDiTPipeline(vae.eval(), UMT5EncoderModel(text).eval(), t5_tokenizer(), audible(transformer))


def audioldm() -> AudioLDMPipeline:
    text = ClapTextConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1,
        max_position_embeddings=40, projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = ClapTextModelWithProjection(text).eval()
    return AudioLDMPipeline(_mel_vae(), encoder, roberta_tokenizer(), _unet(), _ddim(), vocoder())


def musicldm() -> MusicLDMPipeline:
    extractor = ClapFeatureExtractor(n_fft=64)
    return MusicLDMPipeline(_mel_vae(), clap(), roberta_tokenizer(), extractor, _unet(), _ddim(), vocoder())


def tangoflux() -> TangoFluxPipeline:
    """8 samples a frame, 40 frames: at most 0.4 s."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(**TANGOFLUX_TRANSFORMER)
    conditioner = TangoFluxConditioner(16, 16, 30, 40)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)
    parts = _oobleck(), t5(), t5_tokenizer(), conditioner.eval(), transformer.eval(), scheduler
    return TangoFluxPipeline(*parts)


TANGOFLUX_TRANSFORMER: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 2,
    "in_channels": 4,
    "attention_head_dim": 128,  # that of the rotation's axes
    "num_attention_heads": 1,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "guidance_embeds": False,
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "stable_audio_3": stable_audio_3,
    "ace_step": ace_step,
    "longcat": longcat,
    "audioldm": audioldm,
    "musicldm": musicldm,
    "tangoflux": tangoflux,
}


def save_families(directory: Path) -> Path:
    """Each pipeline in a folder of its name."""
    for name, build in FAMILIES.items():
        build().save_pretrained(directory / name)
    return directory


OOBLECK: dict[str, Any] = {
    "encoder_hidden_size": 8,
    "downsampling_ratios": [2, 4],
    "channel_multiples": [1, 2],
    "decoder_channels": 8,
    "decoder_input_channels": 4,
    "audio_channels": 2,
    "sampling_rate": RATE_HZ,
}


def _oobleck(**changes: Any) -> AutoencoderOobleck:
    torch.manual_seed(0)
    return AutoencoderOobleck(**{**OOBLECK, **changes}).eval()


def _mel_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(1, 1, ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2, [8, 16], norm_num_groups=8).eval()


def _unet() -> UNet2DConditionModel:
    """With the text beside the time, as AudioLDM's."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16), class_embed_type="simple_projection", projection_class_embeddings_input_dim=8,
        class_embeddings_concat=True, norm_num_groups=8, attention_head_dim=4,
    )  # fmt: skip
    return unet.eval()


def _ddim() -> DDIMScheduler:
    betas = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, in the place of vocabularies of hundreds of thousands."""
    tokens = ["<pad>", "<|endoftext|>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"pad_token": "<pad>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)
