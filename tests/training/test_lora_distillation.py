"""Students that are adapters of low rank around the frozen teacher."""

from functools import partial
from pathlib import Path

import pytest
import torch
from test_distillation import distillation, run, tiny_teacher
from training_parts import CHANNELS, FRAMES

from foley.core.components import build_component
from foley.core.seeding import torch_generator
from foley.diffusion.sampler import embed
from foley.models.lora import AdaptedDenoiser
from foley.system.checkpoint import read_training_checkpoint

adapters = partial(AdaptedDenoiser, rank=2)
LoraModule = partial(distillation, lora=adapters)


def inputs_of(module) -> dict[str, torch.Tensor]:
    text = embed(module.text, ["a", "bb"])
    more = {"timestep": torch.tensor([19, 999]), "context": text.context, "context_mask": text.mask}
    return {"noisy": torch.randn(2, CHANNELS, FRAMES, generator=torch_generator("noisy")), **more}


def test_the_student_begins_as_the_teacher_and_only_adapters_and_embedding_train() -> None:
    module = LoraModule(tiny_teacher())
    inputs, scale = inputs_of(module), torch.tensor([5.0, 13.0])
    expected = module.teacher(**inputs)
    for network in (module.denoiser, module.target):
        torch.testing.assert_close(network(**inputs, guidance_scale=scale), expected)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name or ".guidance_embedding." in name for name in trained)
    assert len([name for name in trained if ".lora_A." in name]) == 3 * (4 + 4 + 2)
    clean = torch.randn(4, CHANNELS, FRAMES)
    loss = module.consistency_loss(clean, embed(module.text, ["a"] * 4), module.draw(clean.shape, torch_generator("d")))
    loss.backward()
    reached = [name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()]
    assert reached == [name for name in trained if ".lora_A." not in name]  # behind B, which starts at zero


def test_the_target_follows_the_adapters_and_shares_the_rest() -> None:
    module = LoraModule(tiny_teacher(), target_decay=0.9)
    pairs = dict(zip(module.denoiser.named_parameters(), module.target.parameters(), strict=True))
    before = {name: target.clone() for (name, _), target in pairs.items()}
    with torch.no_grad():
        for parameter in module.denoiser.parameters():
            parameter.add_(float(parameter.requires_grad))
    module.update_target()
    for (name, parameter), target in pairs.items():
        trained = ".lora_" in name or "guidance_embedding" in name
        assert (target is parameter) != trained
        torch.testing.assert_close(target, before[name] + (0.1 if trained else 0.0))


@pytest.mark.slow
def test_training_resumes_exactly_and_the_folded_student_is_an_ordinary_one(tmp_path: Path) -> None:
    whole, part = (LoraModule(tiny_teacher()) for _ in range(2))
    run(tmp_path / "whole", 6, whole)
    start = tmp_path / "whole/checkpoints/step_000004.ckpt"
    run(tmp_path / "part", 6, part, start)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(part.state_dict()[name], tensor), name
    checkpoint = read_training_checkpoint(start)
    of_target = [key for key in checkpoint["state_dict"] if key.startswith("target.")]
    assert of_target
    assert all(".lora_" in key or "guidance_embedding" in key for key in of_target)

    adapted = build_component(checkpoint["foley"]["components"]["denoiser"])
    adapted.load_state_dict(whole.denoiser.state_dict())
    inputs, scale = inputs_of(whole), torch.tensor([5.0, 13.0])
    expected = whole.denoiser(**inputs, guidance_scale=scale)
    assert not torch.allclose(expected, whole.teacher(**inputs), atol=1e-6)
    folded = adapted.folded()
    torch.testing.assert_close(folded(**inputs, guidance_scale=scale), expected, atol=1e-5, rtol=1e-4)
    assert set(folded.state_dict()) == set(tiny_teacher().make_student().state_dict())


def test_a_rank_is_positive() -> None:
    with pytest.raises(ValueError, match="positive integer"):
        distillation(tiny_teacher(), lora=partial(AdaptedDenoiser, rank=0))
