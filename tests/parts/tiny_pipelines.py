"""Small random pipelines of diffusers' own classes, in the hub's layout."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    DDIMScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2Model,
    RobertaTokenizerFast,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
STABLE_AUDIO_RATE_HZ = 441  # 8 samples a frame, 32 frames: at most 0.58 s
AUDIOLDM2_RATE_HZ = 16000


def stable_audio_dit(**changes: Any) -> StableAudioDiTModel:
    torch.manual_seed(0)
    sizes = {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "cross_attention_input_dim": 16,
        "global_states_input_dim": 32,
        "time_proj_dim": 8,
    }
    return StableAudioDiTModel(**{**sizes, **changes}).eval()


def stable_audio() -> StableAudioPipeline:
    dit = stable_audio_dit()
    vae = AutoencoderOobleck(8, [2, 4], [1, 2], 8, 4, audio_channels=2, sampling_rate=STABLE_AUDIO_RATE_HZ)
    projection = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=512)
    return StableAudioPipeline(vae, t5(), projection, t5_tokenizer(), dit, CosineDPMSolverMultistepScheduler())


def audioldm2() -> AudioLDM2Pipeline:
    """With a `GPT2Model`, as the published index has it."""
    torch.manual_seed(0)
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=[[None, 8, 16]] * 3,
        norm_num_groups=8,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(1, 1, ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2, [8, 16], norm_num_groups=8)
    language_model = GPT2Config(
        vocab_size=40, n_positions=99, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=2
    )
    language_model.max_new_tokens = 4
    return AudioLDM2Pipeline(
        vae,
        clap(),
        t5(),
        AudioLDM2ProjectionModel(text_encoder_dim=8, text_encoder_1_dim=16, langauge_model_dim=8),
        GPT2Model(language_model),
        roberta_tokenizer(),
        t5_tokenizer(),
        ClapFeatureExtractor(n_fft=64),
        unet,
        DDIMScheduler(
            beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
        ),
        vocoder(),
    )


def save_hub(directory: Path) -> Path:
    """Both pipelines as stabilityai and cvssp publish them."""
    stable_audio().save_pretrained(directory / "stabilityai" / "stable-audio-open-1.0")
    audioldm2().save_pretrained(directory / "cvssp" / "audioldm2")
    return directory


def t5() -> T5EncoderModel:
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def t5_tokenizer() -> T5TokenizerFast:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary = special + [(letter, -3.0) for letter in LETTERS]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=24)


def roberta_tokenizer() -> RobertaTokenizerFast:
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *LETTERS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return RobertaTokenizerFast(vocab=vocabulary, merges=[], model_max_length=24)


def clap() -> ClapModel:
    text = {
        "vocab_size": 40,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 40,
        "projection_dim": 8,
    }
    audio = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "patch_size": 2,
        "patch_stride": 2,
        "projection_dim": 8,
    }
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=8)).eval()


def vocoder() -> SpeechT5HifiGan:
    """Of mel spectrograms with 8 bands, 4 samples a frame."""
    config = SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=AUDIOLDM2_RATE_HZ,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
        normalize_before=False,
        initializer_range=0.3,  # audible
    )
    return SpeechT5HifiGan(config).eval()
