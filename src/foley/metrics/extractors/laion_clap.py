"""LAION-CLAP by the package of its authors, laion-clap, out of a checkpoint file and a tokenizer; no network is asked.

`import laion_clap` fetches three tokenizers, which its training wants, and its model fetches RoBERTa when it is
made. So the part that holds the model, `clap_module`, is imported alone, under the name that the package gives it, and
the model is made with the text branch that fetches nothing; RoBERTa in the sizes of the checkpoint takes its place.
Nothing of the package is patched.
"""

import json
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from foley.core.components import CheckpointError, load_state
from foley.metrics.extractors.clap import (
    REPOSITORY,
    ClapEmbedder,
    ClapExtractor,
    ClapSpectrogram,
    load_tokenizer,
    read_laion_clap,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOURCE = "https://huggingface.co/lukewys/laion_clap"
_MODULE = "clap_module"
_AUDIO_MODELS = {96: "HTSAT-tiny", 128: "HTSAT-base", 256: "HTSAT-large"}
"""The package's audio models by the width of their first stage. The 630k checkpoints are tiny, those of music base."""

_FUSION = "aff_2d"  # of all published checkpoints that fuse
_HEAD_WIDTH = 64  # RoBERTa's
_LAYER_NORM_EPSILON = 1e-5  # of the RoBERTa that the package takes; the port of transformers says 1e-12
_NOT_LEARNED = "text_branch.embeddings.position_ids"  # the package leaves it out, too


class LaionClapEmbedder(ClapEmbedder):
    """`ClapEmbedder` by the package's model, which hears the first 77 tokens of a caption.

    Longer clips are heard in adjoining windows, as by `ClapEmbedder`; the package itself crops them at random.
    """

    longest_text = 77

    def __init__(self, model: nn.Module, tokenizer: "PreTrainedTokenizerBase", device: str = "cpu") -> None:
        self.model: Any = model.requires_grad_(False).eval().to(device)
        self.tokenizer = tokenizer
        self._fusion = bool(self.model.enable_fusion)
        # A model that does not fuse takes waveforms, and makes its spectrograms itself.
        self._spectrogram = ClapSpectrogram(self.sample_rate_hz, fusion=True).to(device)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = REPOSITORY,
        device: str = "cpu",
        download: bool = False,
        checkpoint: str | Path | None = None,
    ) -> "LaionClapEmbedder":
        """The model of a published file.

        Args:
            name_or_path: whose tokenizer is taken, RoBERTa's: a folder, or a name in the Hugging Face cache.
            download: fetch the tokenizer where it is missing.
            checkpoint: the file, such as 630k-audioset-best.pt; its sizes are those of its tensors.

        Raises CheckpointError where one of them is missing, or is no checkpoint of the package.
        """
        if checkpoint is None:
            raise CheckpointError(
                "backend=laion_clap takes its weights from a file of that package, such as 630k-audioset-best.pt of "
                f"{SOURCE}: give checkpoint=FILE, or take backend=transformers"
            )
        state = read_laion_clap(Path(checkpoint))
        state.pop(_NOT_LEARNED, None)
        model = build_model(state, str(checkpoint))
        load_state(model, state, str(checkpoint))
        return cls(model, load_tokenizer(name_or_path, model.text_branch.config.vocab_size, download), device)

    @property
    def dim(self) -> int:
        """D, the width of the embeddings."""
        return int(self.model.joint_embed_shape)

    @torch.inference_mode()
    def windows(self, audio: Tensor) -> Tensor:
        """Embeddings `[W, D]` of windows `[W, 480000]`; on the CPU."""
        audio = audio.to(next(self.model.parameters()).device)
        # No window is longer than the model's own, so all four views of it are the same.
        name, heard = ("mel_fusion", self._views(audio)) if self._fusion else ("waveform", audio)
        embedded: Tensor = self.model.get_audio_embedding([{name: clip, "longer": _NOT_LONGER} for clip in heard])
        return embedded.cpu()

    def extractor(self) -> "LaionClapExtractor":
        """See `ClapEmbedder.extractor`."""
        return LaionClapExtractor(self)

    def _views(self, audio: Tensor) -> Tensor:
        return self._spectrogram(audio).unsqueeze(1).expand(-1, 4, -1, -1)

    def _embed_tokens(self, tokens: dict[str, Tensor]) -> Tensor:
        embedded: Tensor = self.model.get_text_embedding(tokens)
        return embedded


class LaionClapExtractor(ClapExtractor):
    """`ClapExtractor` by the package."""


_NOT_LONGER = torch.tensor([False])


def build_model(state: Mapping[str, Tensor], source: str) -> Any:
    """The package's `CLAP`, untrained, in the sizes of a checkpoint's tensors; raises CheckpointError."""
    try:
        width = state["audio_branch.patch_embed.proj.weight"].shape[0]
        embedding, text_width = state["text_projection.0.weight"].shape
        text_branch = _roberta(state)
    except KeyError as error:
        raise CheckpointError(f"{source} is no checkpoint of laion_clap with RoBERTa: it holds no {error}") from error
    if width not in _AUDIO_MODELS:
        known = ", ".join(f"{name} ({size})" for size, name in _AUDIO_MODELS.items())
        raise CheckpointError(f"{source}: the package has no audio model of width {width}, only {known}")
    fuses = "audio_branch.patch_embed.mel_conv2d.weight" in state
    package = import_clap_module()
    published = Path(str(package.__file__)).parent / "model_configs" / f"{_AUDIO_MODELS[width]}.json"
    config = json.loads(published.read_text(encoding="utf-8"))
    nothing_fetched = {"model_type": "transformer", "width": text_width, "layers": 1, "heads": 1, "vocab_size": 1}
    config["text_cfg"] |= nothing_fetched
    fusion = {"enable_fusion": fuses, "fusion_type": _FUSION if fuses else "None"}
    model = package.CLAP(**config, **fusion, joint_embed_shape=embedding)
    del model.token_embedding, model.positional_embedding, model.ln_final
    model.text_branch, model.text_branch_type = text_branch, "roberta"
    return model


def _roberta(state: Mapping[str, Tensor]) -> nn.Module:
    """An untrained RoBERTa in the sizes of a checkpoint's text branch."""
    from transformers import RobertaConfig, RobertaModel

    vocabulary, width = state["text_branch.embeddings.word_embeddings.weight"].shape
    layers = {match[1] for name in state if (match := re.match(r"text_branch\.encoder\.layer\.(\d+)\.", name))}
    config = RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=max(width // _HEAD_WIDTH, 1),
        intermediate_size=state["text_branch.encoder.layer.0.intermediate.dense.weight"].shape[0],
        max_position_embeddings=state["text_branch.embeddings.position_embeddings.weight"].shape[0],
        type_vocab_size=state["text_branch.embeddings.token_type_embeddings.weight"].shape[0],
        layer_norm_eps=_LAYER_NORM_EPSILON,
    )
    return RobertaModel(config)


def import_clap_module() -> Any:
    """The part of laion-clap that holds its model; raises CheckpointError where the package is not installed."""
    if _MODULE not in sys.modules:
        package = find_spec("laion_clap")  # which does not import it
        spec = PathFinder.find_spec(_MODULE, package.submodule_search_locations) if package else None
        if spec is None or spec.loader is None:
            raise CheckpointError("backend=laion_clap wants the package laion-clap: pip install 'foley[eval]'")
        sys.modules[_MODULE] = module_from_spec(spec)  # as an import does; its own parts import it by this name
        try:
            spec.loader.exec_module(sys.modules[_MODULE])
        except BaseException:
            del sys.modules[_MODULE]
            raise
    return import_module(_MODULE)
