"""Captions by Qwen2-Audio (Chu et al. 2024), which hears the clip."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, ProcessorMixin, Qwen2AudioForConditionalGeneration

from foley.core.channels import check_downmix
from foley.core.hub import load_pretrained
from foley.data.annotating import AnnotationError, Fault, ManifestRow
from foley.data.audio import AudioError, FloatArray, read_audio
from foley.data.captioning.answers import captioned, identity

_AUDIO_PROMPT = "<|audio_bos|><|AUDIO|><|audio_eos|>"


class Qwen2AudioCaptioner(nn.Module):
    """Captions clips in batches, without sampling.

    Args:
        audio_dir: what paths of the manifest are relative to.
        instruction: what follows the audio; the base model was trained on "Generate the caption in English:".
        chat: wrap both in the chat template of the instruction-tuned model.
        max_duration_seconds: of a longer clip only the beginning is heard; the model hears 30 s.
        downmix: as `foley.data.audio.read_audio` takes it.
    """

    key_fields = ("id",)

    def __init__(
        self,
        model: Qwen2AudioForConditionalGeneration,
        processor: ProcessorMixin,
        audio_dir: str,
        name: str,
        instruction: str,
        chat: bool = False,
        max_new_tokens: int = 64,
        max_duration_seconds: float = 30.0,
        downmix: str = "mean",
    ) -> None:
        super().__init__()
        self._downmix = check_downmix(downmix)
        self.model = model.requires_grad_(False).eval()
        self.processor = processor
        # Generation goes on from the last column, which must not be padding.
        self.processor.tokenizer.padding_side = "left"
        self._sample_rate_hz = int(processor.feature_extractor.sampling_rate)
        self._audio_dir = Path(audio_dir)
        self._prompt = self._chat_prompt(instruction) if chat else f"{_AUDIO_PROMPT}{instruction}"
        self._max_new_tokens = max_new_tokens
        self._max_duration_seconds = max_duration_seconds
        self.identity = identity("qwen2_audio", name, self._prompt)
        if downmix != "mean":
            self.identity["downmix"] = downmix

    def start(self, world_size: int, device: torch.device) -> None:
        """Nothing to start."""

    def annotate(self, rows: Sequence[ManifestRow]) -> list[dict[str, Any] | Fault]:
        """One caption a row; rows whose audio cannot be used are faults, and the others go on."""
        clips = [self._read(row) for row in rows]
        captions = iter(self._generate([clip for clip in clips if not isinstance(clip, Fault)]))
        return [clip if isinstance(clip, Fault) else self._result(next(captions)) for clip in clips]

    def _chat_prompt(self, instruction: str) -> str:
        content: Any = [{"type": "audio", "audio_url": ""}, {"type": "text", "text": instruction}]
        prompt: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return prompt

    def _read(self, row: ManifestRow) -> FloatArray | Fault:
        try:
            path, limit = self._audio_dir / row["path"], self._max_duration_seconds
            return read_audio(path, self._sample_rate_hz, limit, downmix=self._downmix)
        except AudioError as error:
            return Fault(str(error))

    @torch.inference_mode()
    def _generate(self, clips: Sequence[FloatArray]) -> list[str]:
        if not clips:
            return []
        inputs = self.processor(
            text=[self._prompt] * len(clips),
            audio=list(clips),
            sampling_rate=self._sample_rate_hz,
            return_tensors="pt",
            padding=True,
        ).to(self.model.device)
        inputs["input_features"] = inputs["input_features"].to(self.model.dtype)
        tokens: Tensor = self.model.generate(**inputs, max_new_tokens=self._max_new_tokens, do_sample=False)
        captions: list[str] = self.processor.batch_decode(
            tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return captions

    def _result(self, caption: str) -> dict[str, Any] | Fault:
        return captioned(caption, self.identity) if caption.strip() else Fault("the model said nothing")


def load_qwen2_audio(
    name_or_path: str, audio_dir: str, dtype: str = "bfloat16", download: bool = False, **options: Any
) -> Qwen2AudioCaptioner:
    """A captioner with published weights, from the Hugging Face cache or a local directory.

    Args:
        download: fetch missing files; otherwise a machine without them fails at once.
        options: the rest of `Qwen2AudioCaptioner`'s.

    Raises:
        AnnotationError: files are missing.
    """
    where = {"local_files_only": not download}
    mend = "set `captioner.download=true`, or give a local folder as `captioner.name_or_path`"
    load = partial(load_pretrained, name_or_path=name_or_path, error_type=AnnotationError, mend=mend)
    processor = load(AutoProcessor.from_pretrained, options=where)
    load_model = Qwen2AudioForConditionalGeneration.from_pretrained
    model = load(load_model, options={**where, "dtype": getattr(torch, dtype)})
    return Qwen2AudioCaptioner(model, processor, audio_dir, name_or_path, **options)
