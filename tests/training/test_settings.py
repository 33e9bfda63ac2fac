"""Reliability rows 23 and 24: what a resumed run changes is applied or refused by name, and so is a warm start's."""

import copy
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from training_parts import CHANNELS, build_module, run

from foley.core.components import CheckpointError
from foley.core.config import PROJECT_ROOT, shipped
from foley.training import run as training
from foley.training import settings
from foley.training.base import _differences
from foley.training.optim import constant_schedule, cosine_schedule
from foley.training.run import plain, train, warm_start
from foley.training.settings import (
    FILES_KEY,
    SETTINGS_KEY,
    changes,
    file_hashes,
    is_applied,
    portable,
    require_resumable,
    unlike,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, on folders that are not empty


def config(folder: Path, *overrides: str) -> DictConfig:
    own = ["name=test", "experiment=tiny", f"data.cache_dir={folder}/latents", f"paths.output_dir={folder}"]
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return compose("train", [*own, *overrides])


def leaves(node: Any, key: str = "") -> Iterator[str]:
    """Dotted names of everything in a plain config that is no mapping, or an empty one."""
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}".lstrip("."))
    else:
        yield key


def with_other(node: dict, key: str) -> dict:
    """A copy of `node` in which one leaf is another value."""
    changed = copy.deepcopy(node)
    *parents, last = key.split(".")
    inner = changed
    for name in parents:
        inner = inner[name]
    inner[last] = "another value"
    return changed


def refusal(now: dict) -> str | None:
    try:
        require_resumable(Path("last.ckpt"), now)
    except CheckpointError as error:
        return str(error)
    return None


def test_every_setting_of_a_recipe_is_applied_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = portable(
        plain(config(tmp_path, "callbacks=[audio_samples,evaluation]", "callbacks.evaluation.reference=x"))
    )
    monkeypatch.setattr(settings, "stored_settings", lambda path: before)
    caplog.set_level("INFO")
    applied, refused = set(), set()
    for key in leaves(before):
        caplog.clear()
        error = refusal(with_other(before, key))
        if error is None:
            assert f"{key}: " in caplog.text or key.startswith(("paths.", "ckpt_path", "overwrite", "task."))
        else:
            assert f"\n  {key}: " in error
        (applied if error is None else refused).add(key)
    assert {"seed", "task.seed", "data.seed", "data.batch_size", "data.duration_seconds", "ckpt", "stage"} <= refused
    assert {"model.width", "process.prediction", "text.dim", "task.caption_dropout", "codec.latent_channels"} <= refused
    assert {"optimizer._target_", "trainer.limit_train_batches", "lr_schedule"} & applied == set()
    assert {"optimizer.lr", "optimizer.weight_decay", "optimizer.betas", "lr_schedule.warmup_steps"} <= applied
    assert {
        "trainer.accumulate_grad_batches",
        "trainer.max_steps",
        "trainer.precision",
        "trainer.devices",
        "trainer.log_every_n_steps",
    } <= applied
    assert {"callbacks.ema.decay", "callbacks.checkpoint.every_n_train_steps", "data.num_workers"} <= applied


def test_where_things_lie_may_change() -> None:
    """Of a student and of a ControlNet."""
    moved = ["system", "codec_path", "data.cache_dir", "task.teacher.path", "task.base.path", "task.codec.source"]
    assert all(map(is_applied, moved))
    assert not is_applied("task.codec.width")
    saved, own = ({"components": {"teacher": {"path": place}, "codec": {"source": place}}} for place in "ab")
    assert _differences(saved, own) == []


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["seed=3"], r"seed: 0 in the checkpoint, 3 in this run"),
        (["data.batch_size=2"], r"data\.batch_size: \d+ in the checkpoint, 2 in this run"),
        (["callbacks.ema=null"], r"callbacks\.ema: \{.*'decay': 0\.999\} in the checkpoint, None in this run"),
        (["process=epsilon"], r"process\.prediction: v in the checkpoint, epsilon in this run"),
        (["task.masking=null"], r"task\.masking"),
        (["ckpt=other.ckpt"], r"ckpt: None in the checkpoint, other\.ckpt in this run"),
    ],
)
def test_resuming_with_another_setting_is_refused_before_anything_is_written(
    tmp_path: Path, overrides: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "refuse_missing", lambda cfg: None)  # the latents are not there
    last = tmp_path / "checkpoints/last.ckpt"
    last.parent.mkdir()
    torch.save({"foley": {SETTINGS_KEY: portable(plain(config(tmp_path)))}, "global_step": 4}, last)
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents/index.json").touch()
    require_resumable(last, portable(plain(config(tmp_path, "lr_schedule=constant"))))  # which has a clear meaning
    with pytest.raises(CheckpointError, match=rf"(?s)cannot change these settings:.*{named}.*ckpt= in the place of"):
        train(config(tmp_path, "ckpt_path=auto", *overrides))
    assert not (tmp_path / "config.yaml").exists()


def test_older_checkpoints_are_compared_with_the_snapshot_beside_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = tmp_path / "checkpoints/last.ckpt"
    last.parent.mkdir()
    torch.save({"foley": {}, "global_step": 4}, last)
    require_resumable(last, {"seed": 3})
    assert "says nothing of the settings" in caplog.text
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(CheckpointError, match="seed: 0 in the checkpoint, 3 in this run"):
        require_resumable(last, {"seed": 3})


def test_a_setting_that_goes_away_is_one_change() -> None:
    assert list(changes({"a": {"b": 1}, "c": None}, {"a": None})) == [("a", {"b": 1}, None)]
    assert is_applied("callbacks.ema.decay")
    assert not is_applied("callbacks.ema")
    assert not is_applied("something.new")


def test_rate_decay_and_schedule_of_a_resumed_run_are_its_own(tmp_path: Path) -> None:
    run(tmp_path, 4)
    last = tmp_path / "checkpoints/last.ckpt"
    module = build_module()
    module.make_optimizer = partial(torch.optim.AdamW, lr=0.5, weight_decay=0.25, betas=(0.5, 0.75))
    module.make_lr_schedule = partial(cosine_schedule, total_steps=8, warmup_steps=1, final_ratio=0.0)
    trainer, _, _ = run(tmp_path, 6, last, module=module)
    (optimizer,) = trainer.optimizers
    expected = cosine_schedule(torch.optim.AdamW(module.parameters(), lr=0.5), 8, 1, 0.0).lr_lambdas[0](6) * 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [expected, expected]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.5, 0.75)}
    assert {int(state["step"]) for state in optimizer.state.values()} == {6}, "moments go on"


def test_the_first_resumed_step_has_the_new_rate(tmp_path: Path) -> None:
    run(tmp_path, 4)
    frozen = build_module()
    frozen.make_optimizer = partial(torch.optim.AdamW, lr=0.0, weight_decay=0.0)
    frozen.make_lr_schedule = constant_schedule
    _, after, _ = run(tmp_path, 5, tmp_path / "checkpoints/last.ckpt", module=frozen)
    saved = torch.load(tmp_path / "checkpoints/step_000004.ckpt", weights_only=True)["current_weights"]
    assert all(torch.equal(after.state_dict()[name], weight) for name, weight in saved.items())


def described(**components: dict) -> dict:
    return {"components": components}


DENOISER = {"_target_": "foley.models.dit.model.DiffusionTransformer", "num_heads": 4, "context_dim": 8}
TEXT = {"_target_": "foley.models.text.SmallTextEncoder", "tokenizer_file": "a.json", "dim": 8}
PROCESS = {"_target_": "foley.diffusion.process.DiffusionProcess", "prediction": "v"}
NORMALISER = {"_target_": "foley.models.codec.normaliser.LatentNormaliser", "channels": 4}


@pytest.mark.parametrize(
    ("name", "before", "now", "found"),
    [
        (
            "process",
            PROCESS,
            {**PROCESS, "prediction": "epsilon", "zero_terminal_snr": False},
            {"prediction", "zero_terminal_snr"},
        ),
        ("process", PROCESS, {**PROCESS, "zero_terminal_snr": True}, set()),
        ("normaliser", NORMALISER, {**NORMALISER, "compressed": True}, {"compressed"}),
        ("text", TEXT, {**TEXT, "tokenizer_file": "b.json"}, {"tokenizer_file"}),
        ("text", TEXT, {"_target_": "foley.models.text.FrozenT5Conditioner", "dim": 8}, {"_target_", "tokenizer_file"}),
        ("text", {**TEXT, "download": False}, {**TEXT, "download": True}, set()),
        ("denoiser", DENOISER, {**DENOISER, "num_heads": 2}, {"num_heads"}),
        ("denoiser", {**DENOISER, "context_dim": None}, DENOISER, set()),
        ("denoiser", DENOISER, {**DENOISER, "guidance_embedding": True, "gradient_checkpointing": True}, set()),
        ("masking", {"partial_probability": 1.0}, {"partial_probability": 0.25}, set()),
    ],
)
def test_what_weights_mean(name: str, before: dict, now: dict, found: set[str]) -> None:
    keys = {key for key, *_ in unlike(described(**{name: before}), described(**{name: now}), ["denoiser.inner.weight"])}
    assert {f"{name}.{option}" for option in found} <= keys
    assert bool(keys) == bool(found)


def test_a_tokenizer_is_known_by_its_content(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("one", "moved", "other")}
    for name, file in files.items():
        file.write_text("other words" if name == "other" else "words")
    texts = {name: {"text": {**TEXT, "tokenizer_file": str(file)}} for name, file in files.items()}
    one, moved, other = ({**described(**texts[name]), FILES_KEY: file_hashes(texts[name])} for name in files)
    assert unlike(one, moved, []) == []
    ((key, *_),) = unlike(one, other, [])
    assert key == "text.tokenizer_file"
    unhashed = described(**texts["moved"])  # as of a system's folder
    assert unlike(unhashed, one, []) == []
    assert [key for key, *_ in unlike(unhashed, other, [])] == ["text.tokenizer_file"]


def test_the_shipped_system_and_the_shipped_recipe_agree_on_the_tokenizer() -> None:
    system = {"text": json.loads(shipped("demo/text/config.json").read_text())}
    system["text"]["tokenizer_file"] = str(shipped("demo/text/audiocaps.json"))
    recipe = {"text": {**system["text"], "tokenizer_file": str(shipped("tokenizer/audiocaps.json"))}}
    assert unlike(described(**system), described(**recipe), []) == []


def test_warm_start_refuses_weights_of_another_meaning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def build(prediction: str, mean: float = 0.0):
        module = build_module()
        module.component_configs["process"] = {**PROCESS, "prediction": prediction}
        module.normaliser.set(torch.full((CHANNELS,), mean), torch.ones(CHANNELS))
        return module

    run(tmp_path, 2, module=build("v"))
    last = tmp_path / "checkpoints/last.ckpt"
    with pytest.raises(
        CheckpointError, match=r"(?s)process\.prediction: v in .*, x0 in .*ckpt_allow=\[process\.prediction\]"
    ):
        warm_start(build("x0"), last)
    with pytest.raises(CheckpointError, match=r"normaliser: its statistics .* 3\.0 deviations away"):
        warm_start(build("v", mean=3.0), last)
    warm_start(build("x0", mean=3.0), last, allow=["process", "normaliser"])
    assert "process.prediction is v in" in caplog.text
    warm_start(build("v", mean=0.5), last)
