"""EzAudio's ControlNet: a text-to-audio model that also follows the loudness of a recording.

The paper has it as future work; its repository ships it for EzAudio-L (`ckpts/controlnet/energy_l.yml`), after
ControlNet (Zhang et al. 2023). The model is frozen. A copy of its in-blocks reads the same noisy latent and, added to
the tokens, an embedding of the recording's energy; what a copied block gives is added to the long skip of its original:

    c      = E(energy)                                  convolutions, the last of which begins at zero
    h_0    = project(noisy, visible, mask) + c          the copy's own projection
    h_i    = copied in-block i of h_{i-1}
    skip_i <- skip_i + scale * Z_i h_i                  Z_i begins at zero: so the whole begins as the model itself

Trained are the embedding, the copied blocks and the projections Z; the copies of projection, time and text embedding
stay as they are. Both branches of guidance are given the energy.

Known of the published code: architecture, energy, which weights train, how the energy is hidden in training, sampling.
Not published is the training itself; `foley.training.control` says what ours is.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foley.models.dit.hoisting import BlockInputs, Conditions
from foley.models.dit.model import DiffusionTransformer, TransformerBlock
from foley.nn.feedforward import zero_linear

# ---------------------------------------------------------------- the energy of a recording

_WINDOW_HOPS = 8  # 1920 samples, moved on by 240
_FLOOR_DB = -60.0
_TINY = 1e-8


def energy_curve(audio: Tensor, hop_samples: int) -> Tensor:
    """The loudness of `audio [B, T]` over time, `[B, 1, T / hop]` in [0, 1]: 0 at -60 dB, 1 at the loudest window.

    Audio is brought to a peak of 1; a window of 8 hops, centred on its hop, has the mean square of its samples, -60 dB
    or more. Published with hops of 240 samples at 24 kHz: two to a latent frame.

    >>> energy_curve(torch.ones(1, 4800), hop_samples=240).unique().tolist()  # as loud throughout
    [1.0]
    >>> energy_curve(torch.zeros(1, 4800), hop_samples=240).shape
    torch.Size([1, 1, 20])
    """
    peak = audio.abs().amax(dim=-1, keepdim=True)
    audio = audio / (peak + 1e-9)
    window, num_hops = _WINDOW_HOPS * hop_samples, audio.shape[-1] // hop_samples
    beside = (window - hop_samples) // 2
    longer = max(0, beside + 1 - audio.shape[-1])  # what is shorter than half a window has nothing to mirror
    padded = F.pad(F.pad(audio, (0, longer)), (beside, beside), mode="reflect")
    power = padded.square().unfold(-1, window, hop_samples)[:, :num_hops].mean(dim=-1)  # [B, T / hop]
    decibels = 10 * power.clamp(min=10 ** (_FLOOR_DB / 10)).log10()
    loudest = decibels.amax(dim=-1, keepdim=True)
    return ((decibels - _FLOOR_DB) / (loudest - _FLOOR_DB + _TINY)).unsqueeze(1)


class ControlEmbedding(nn.Module):
    """The curve `[B, K, S]` of a recording to what is added to the tokens, `[B, L, D]`; it begins at zero.

    Each step from one width to the next halves the number of values: S = L * `values_per_frame`.

    Args:
        channels: K; 1 of an energy.
        widths: of the convolutions.
        width: D.
    """

    def __init__(self, channels: int, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.values_per_frame = 2 ** (len(widths) - 1)
        self.input = nn.Conv1d(channels, widths[0], kernel_size=1)
        self.mask_embedding = nn.Parameter(torch.zeros(widths[0]))  # stands where the curve is hidden
        # The mask is a channel more.
        inputs = [widths[0] + 1, *widths[1:]]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(narrow, narrow, kernel_size=3, padding=1),
                nn.SiLU(),
                nn.Conv1d(narrow, wide, kernel_size=3, padding=1, stride=2),
                nn.SiLU(),
            )
            for narrow, wide in zip(inputs, widths[1:], strict=False)
        )
        self.output = nn.Conv1d(inputs[-1], width, kernel_size=1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(cast(Tensor, self.output.bias))

    def forward(self, curve: Tensor, hidden: Tensor | None = None) -> Tensor:
        """`hidden [B, S]` is true where the curve is not shown; None shows all of it."""
        x = self.input(curve.to(self.input.weight.dtype))  # [B, widths[0], S]
        mask = torch.zeros_like(x[:, :1]) if hidden is None else hidden.unsqueeze(1).to(x.dtype)
        x = torch.where(mask.bool(), self.mask_embedding[:, None], x)
        x = torch.cat([x, mask], dim=1)
        for stage in self.stages:
            x = stage(x)
        return self.output(x).transpose(1, 2)


# ---------------------------------------------------------------- the copy


class ControlNet(nn.Module):
    """The copy of a model's in-blocks and of what comes before them, the embedding, and the projections to the skips.

    Args:
        model: copied.
        channels, widths: as for `ControlEmbedding`.
    """

    def __init__(self, model: DiffusionTransformer, channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        width = model.input_projection.out_features
        self.input_projection = deepcopy(model.input_projection)
        self.positions = deepcopy(model.positions)
        self.time_embedding = deepcopy(model.time_embedding)
        self.shared_modulation = deepcopy(model.shared_modulation)
        self.context_embedding = deepcopy(model.context_embedding)
        self.in_blocks = deepcopy(model.in_blocks)
        for layer in self.in_blocks.modules():
            if hasattr(layer, "cacheable_kind"):  # calibrations know no recording: the copy is always computed
                layer.cacheable_kind = None  # type: ignore[assignment]  # of a module, to mypy
        self.embedding = ControlEmbedding(channels, widths, width)
        self.projections = nn.ModuleList(zero_linear(width, width) for _ in self.in_blocks)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that train, as published: the rest of the copy stays the model's."""
        parts = self.embedding, self.in_blocks, self.projections
        return [parameter for part in parts for parameter in part.parameters()]

    def block_inputs(self, timestep: Tensor, context: Tensor | None, like: BlockInputs) -> BlockInputs:
        """Inputs of the copied blocks, by the copy's embeddings of time and text; all else is `like` the model's."""
        time = F.silu(self.time_embedding(timestep))
        shared = None if self.shared_modulation is None else self.shared_modulation(time)
        if context is not None and self.context_embedding is not None:
            context = self.context_embedding(context.to(self.input_projection.weight.dtype))
        return replace(like, time=time, shared_modulation=shared, context=context)

    def static_input(self, known: Tensor, curve: Tensor, hidden: Tensor | None) -> Tensor:
        """What all evaluations share of the tokens, `[B, L, D]`.

        Args:
            known: visible latent and mask, `[B, L, C + 1]` or `[1, 1, C + 1]`.
            curve, hidden: as for `ControlEmbedding`.
        """
        weight = self.input_projection.weight[:, -known.shape[-1] :]
        static = F.linear(known, weight, self.input_projection.bias) + self.embedding(curve, hidden)
        return static if self.positions is None else self.positions(static)

    def project_noisy(self, noisy: Tensor) -> Tensor:
        """`[B, C, L]` to its share of the tokens, `[B, L, D]`."""
        weight = self.input_projection.weight[:, : noisy.shape[1]]
        return F.linear(noisy.transpose(1, 2).to(weight.dtype), weight)


# ---------------------------------------------------------------- model and copy together


@dataclass(frozen=True)
class ControlledConditions(Conditions):
    """`blocks` holds those of the model, then those of the copy.

    Without a recording `control_input` is None; else it is `[B, L, D]`, and `control_scale` `[B, 1, 1]`.
    """

    control_input: Tensor | None = None
    control_scale: Tensor | None = None


class ControlledTransformer(DiffusionTransformer):
    """A `DiffusionTransformer` with a ControlNet; without a recording it is that model, bit by bit.

    Args:
        control_channels: K, of the curve.
        control_widths: of the convolutions of its embedding, as published.
        model: the options of `DiffusionTransformer`.

    Raises:
        ValueError: a model without long skips, or with a time token, whose copy has nothing to add to.

    Example:
        >>> from foley.nn.adaln import AdaLNSola
        >>> sizes = {"latent_channels": 8, "width": 32, "depth": 2, "num_heads": 2, "context_dim": 16}
        >>> denoiser = ControlledTransformer(**sizes, modulation=AdaLNSola(rank=4, alpha=4))
        >>> noisy, time, text = torch.randn(1, 8, 50), torch.tensor([999]), torch.randn(1, 7, 16)
        >>> curve = torch.rand(1, 1, 100)  # two values to a frame
        >>> torch.equal(denoiser(noisy, time, text, control=curve), denoiser(noisy, time, text))  # untrained
        True
    """

    def __init__(self, *, control_channels: int = 1, control_widths: Sequence[int] = (64, 128), **model: Any) -> None:
        super().__init__(**model)
        if not model.get("long_skips", True) or self.prepends_time_token:
            raise ValueError("a ControlNet adds to long skips, of a model whose blocks the time modulates")
        self.control = ControlNet(self, control_channels, control_widths)

    def curve(self, audio: Tensor, hop_samples: int) -> Tensor:
        """The curve `[B, 1, S]` of `audio [B, L hop]`, whose latent frames are `hop_samples` apart."""
        values = self.control.embedding.values_per_frame
        return energy_curve(audio, hop_samples // values)[..., : audio.shape[-1] // hop_samples * values]

    def copy_model(self) -> None:
        """Let the copy have the weights that the model has now; the embedding and the projections keep theirs."""
        own, model = self.control.state_dict(), self.state_dict()
        self.control.load_state_dict({name: model.get(name, value) for name, value in own.items()})

    def blocks(self) -> list[TransformerBlock]:
        """Those of the model, in order of execution, then those of the copy."""
        return [*super().blocks(), *cast(Sequence[TransformerBlock], self.control.in_blocks)]

    def condition(
        self,
        timestep: Tensor,
        num_frames: int,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        frame_mask: Tensor | None = None,
        visible: Tensor | None = None,
        hidden_mask: Tensor | None = None,
        guidance_scale: Tensor | None = None,
        control: Tensor | None = None,
        control_hidden: Tensor | None = None,
        control_scale: Tensor | None = None,
    ) -> ControlledConditions:
        """As the model's own, and the inputs of the copy.

        Args:
            control: a curve `[B, K, S]`, S values for L frames; None leaves the copy out.
            control_hidden: `[B, S]`, true where it is not shown.
            control_scale: how far it is followed `[B]`; None is 1.
        """
        inputs = context, context_mask, frame_mask, visible, hidden_mask, guidance_scale
        plain = super().condition(timestep, num_frames, *inputs)
        count = len(super().blocks())
        copy = self.control.block_inputs(timestep, context, plain.blocks[0])
        blocks = [*plain.blocks[:count], *[copy] * len(self.control.in_blocks)]
        static = None
        if control is not None:
            self._check(control, num_frames)
            static = self.control.static_input(self.masked_input(visible, hidden_mask), control, control_hidden)
        scale = None if control_scale is None else control_scale[:, None, None]
        return ControlledConditions(plain.static_input, plain.time, blocks, plain.output_modulation, static, scale)

    def _check(self, control: Tensor, num_frames: int) -> None:
        wanted = num_frames * self.control.embedding.values_per_frame
        if control.shape[-1] != wanted:
            raise ValueError(f"control has {control.shape[-1]} values; {num_frames} latent frames want {wanted}")

    def _additions(self, noisy: Tensor, conditions: Conditions) -> Sequence[Tensor]:
        assert isinstance(conditions, ControlledConditions)
        if conditions.control_input is None:
            return ()
        x = self.control.project_noisy(noisy) + conditions.control_input  # h_0
        additions, own = [], conditions.blocks[len(super().blocks()) :]
        for block, projection, inputs in zip(self.control.in_blocks, self.control.projections, own, strict=True):
            x = self._run(block, x, inputs)  # h_i
            addition = projection(x)  # Z_i h_i
            scale = conditions.control_scale
            additions.append(addition if scale is None else scale.to(addition.dtype) * addition)
        return additions


_TARGET = f"{ControlledTransformer.__module__}.{ControlledTransformer.__qualname__}"


def controlled_config(model: Mapping[str, Any], widths: Sequence[int] = (64, 128), channels: int = 1) -> dict[str, Any]:
    """How to build a `ControlledTransformer`, from how to build its model; the config of one is returned as it is."""
    if model["_target_"] == _TARGET:
        return dict(model)
    return {**model, "_target_": _TARGET, "control_channels": channels, "control_widths": list(widths)}


def parted_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """How to build the model of a `ControlledTransformer`, and its ControlNet, each by itself."""
    model = {name: value for name, value in config.items() if not name.startswith("control_")}
    model["_target_"] = f"{DiffusionTransformer.__module__}.{DiffusionTransformer.__qualname__}"
    copy = {"channels": config["control_channels"], "widths": config["control_widths"]}
    return model, {"_target_": f"{ControlNet.__module__}.{ControlNet.__qualname__}", "model": model, **copy}
