"""A small teacher, and the distillation of it."""

from functools import partial

import torch
from stirring_parts import stir
from torch import nn
from training_parts import CHANNELS, TinyText

from foley.core.components import build_component
from foley.diffusion.consistency import Consistency
from foley.diffusion.process import DiffusionProcess
from foley.losses.regression import pseudo_huber
from foley.models.codec.normaliser import LatentNormaliser
from foley.system.system import System
from foley.training.distillation import ConsistencyDistillation, Teacher

DENOISER = {
    "_target_": "foley.models.dit.model.DiffusionTransformer",
    **{"latent_channels": CHANNELS, "width": 16, "depth": 2, "num_heads": 2, "context_dim": TinyText.dim},
    "modulation": {"_target_": "foley.nn.adaln.AdaLN"},
}


def process_of(prediction: str, num_train_steps: int = 1000) -> DiffusionProcess:
    return DiffusionProcess(prediction, num_train_steps, zero_terminal_snr=prediction != "epsilon")


def teacher_of(denoiser: nn.Module, prediction: str = "v", text: nn.Module | None = None, **more) -> Teacher:
    modules = {"denoiser": denoiser, "text": text or TinyText(), "normaliser": LatentNormaliser(CHANNELS)}
    configs = {name: {"_target_": "unknown"} for name in ("text", "normaliser", "process")} | {"denoiser": DENOISER}
    return Teacher(System(modules, more.pop("process", process_of(prediction)), configs), set())


def tiny_teacher(prediction: str = "v", text: nn.Module | None = None) -> Teacher:
    torch.manual_seed(0)
    denoiser = build_component(DENOISER)
    stir(denoiser)  # zero-initialised layers would hide the text and the time
    return teacher_of(denoiser, prediction, text)


def distillation(teacher: Teacher, lr: float = 1e-3, **options) -> ConsistencyDistillation:
    optimizer = partial(torch.optim.AdamW, lr=lr)
    options = {"consistency": Consistency(50), "loss": pseudo_huber} | options
    return ConsistencyDistillation(teacher, optimizer=optimizer, **options)
