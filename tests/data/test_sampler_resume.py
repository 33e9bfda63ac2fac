import re
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from foley.data.dataset import SampleKey
from foley.data.ordering import ResumableSampler, even_share, evenly_spaced
from foley.data.resumable import ResumableDataModule


def test_each_epoch_is_a_new_permutation():
    sampler = ResumableSampler(10, seed=3)
    epochs = [list(sampler), list(sampler)]
    for epoch, keys in enumerate(epochs):
        assert sorted(keys) == [SampleKey(index, epoch) for index in range(10)]
    assert [key.index for key in epochs[0]] != [key.index for key in epochs[1]]
    assert epochs[1] == list(_at(ResumableSampler(10, seed=3), 1))
    assert epochs[0] == list(ResumableSampler(10, seed=3))


def test_without_shuffling_every_epoch_has_the_same_mixed_order():
    sampler = ResumableSampler(10, seed=3, shuffle=False)
    first, second = ([key.index for key in sampler] for _ in range(2))
    assert first == second != list(range(10))
    assert sorted(first) == list(range(10))


def _at(sampler, epoch, consumed=0):
    sampler.load_state_dict({"epoch": epoch, "consumed": consumed, "size": sampler.size})
    return sampler


@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_the_samples(drop_last):
    ranks = [list(ResumableSampler(23, 0, 2, True, drop_last, rank, 3)) for rank in range(3)]
    joined = [key.index for keys in ranks for key in keys]
    assert len(set(joined)) == len(joined) == (18 if drop_last else 23)
    if drop_last:
        assert {len(keys) for keys in ranks} == {6}


@pytest.mark.parametrize("size", range(3, 20))
def test_ranks_have_equally_many_batches_to_validate(size):
    """Where weights are sharded, a rank with a batch more than the others would wait for them for ever."""
    ranks = [list(ResumableSampler(size, 0, 2, False, False, rank, 3)) for rank in range(3)]
    assert len({-(-len(keys) // 2) for keys in ranks}) == 1
    assert size - sum(map(len, ranks)) in ((size % 6,) if size > 6 and size % 6 < 3 else (0,))


@pytest.mark.parametrize("consumed", [0, 4, 8, 12])
def test_a_loaded_state_goes_on_where_it_stopped_and_later_epochs_are_whole(consumed):
    def sampler():
        return ResumableSampler(17, 1, batch_size=2, rank=1, world_size=2)

    straight = [key for epoch in (5, 6) for key in _at(sampler(), epoch)]
    resumed = _at(sampler(), 5, consumed)
    assert len(resumed) == 8
    assert list(resumed) == straight[consumed // 2 : 8]
    assert resumed.state_dict() == {"epoch": 6, "consumed": 0, "size": 17}
    assert list(resumed) == straight[8:]


def test_position_follows_the_progress_of_training_and_not_what_was_drawn():
    trained = 0
    sampler = _at(ResumableSampler(20, batch_size=2, max_batches=4, progress=lambda: trained), 3, 4)
    ahead = iter(sampler)
    drawn = [next(ahead) for _ in range(6)]
    assert sampler.state_dict() == {"epoch": 3, "consumed": 4, "size": 20}
    trained = 1
    assert sampler.state_dict() == {"epoch": 3, "consumed": 6, "size": 20}
    assert list(sampler)[:4] == drawn[2:]
    trained = 2 + 4 + 3
    assert sampler.state_dict() == {"epoch": 5, "consumed": 6, "size": 20}


def test_another_number_of_samples_begins_the_epoch_anew(caplog):
    sampler = ResumableSampler(12)
    sampler.load_state_dict({"epoch": 2, "consumed": 4, "size": 10})
    assert len(list(sampler)) == 12
    assert "12 samples, and had 10" in caplog.text


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="rank 2"):
        ResumableSampler(10, rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"3 samples do not fill one batch of 8 .*set data\.batch_size=3 or less"):
        ResumableSampler(3, batch_size=4, world_size=2)


class _Keys(Dataset):
    def __getitem__(self, key):
        return torch.tensor(key)

    def __len__(self):
        return 15


class _KeyModule(ResumableDataModule):
    collate = staticmethod(torch.stack)

    def __init__(self, num_workers):
        super().__init__(batch_size=2, num_workers=num_workers, seed=7)
        self.datasets = {"train": _Keys(), "val": _Keys()}


class _Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.automatic_optimization = True
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.global_step, batch.tolist()))
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(folder, max_steps, resume=None, num_workers=0, **options):
    recorder = _Recorder()
    callbacks = [
        pl.callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1),
        pl.callbacks.ModelCheckpoint(
            folder, filename="end-{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
        ),
    ]
    trainer = pl.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accelerator="cpu",
        **options,
    )
    trainer.fit(recorder, datamodule=_KeyModule(num_workers), ckpt_path=resume, weights_only=True)
    return recorder.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("num_workers", "options"),
    [(0, {}), (1, {}), (0, {"limit_train_batches": 5}), (0, {"val_check_interval": 3, "limit_val_batches": 1})],
)
def test_trainer_resumes_at_the_next_batch(num_workers, options, tmp_path):
    straight = _fit(tmp_path, 18, num_workers=num_workers, **options)
    assert [step for step, _ in straight] == list(range(18))
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert any(path.name.startswith("end-") for path in checkpoints)
    chosen = (
        checkpoints if num_workers == 0 else [path for path in checkpoints if "=7." in path.name or "=4." in path.name]
    )
    for checkpoint in chosen:
        step = int(checkpoint.stem.split("=")[1])
        if step < 18:
            resumed = _fit(tmp_path / "resumed", 18, checkpoint, num_workers, **options)
            assert resumed == straight[step:], checkpoint.name


def _on(rank, devices, batch_size=6, accumulated=1):
    """The data module of a rank, as a trainer has it before the first batch."""
    module = _KeyModule(0)
    module.batch_size = batch_size
    loop = SimpleNamespace(
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0)))
    )
    shares = {"global_rank": rank, "world_size": devices, "accumulate_grad_batches": accumulated}
    module.trainer = SimpleNamespace(**shares, limit_train_batches=1.0, fit_loop=loop)
    return module


def test_a_batch_is_shared_out_over_devices_and_stays_the_same():
    whole = [batch.tolist() for batch in _on(0, 1).train_dataloader()]
    for devices in (2, 3):
        ranks = [[batch.tolist() for batch in _on(rank, devices).train_dataloader()] for rank in range(devices)]
        assert {len(batch) for batches in ranks for batch in batches} == {6 // devices}
        together = [
            [key for keys in zip(*batches, strict=True) for key in keys] for batches in zip(*ranks, strict=True)
        ]
        assert together == whole
        evaluated = [torch.cat(list(_on(rank, devices).val_dataloader()))[:, 0].tolist() for rank in range(devices)]
        assert sorted(index for indices in evaluated for index in indices) == list(range(15))


@pytest.mark.parametrize(("devices", "accumulated"), [(1, 2), (1, 3), (1, 6), (3, 2), (2, 3)])
@pytest.mark.parametrize("bucket_batches", [None, 2])
def test_a_step_has_the_same_samples_on_any_devices_in_any_number_of_batches(devices, accumulated, bucket_batches):
    def steps(devices, accumulated):
        """The samples of each step, over ranks and accumulated batches."""
        modules = [_on(rank, devices, accumulated=accumulated) for rank in range(devices)]
        for module in modules:
            module.bucket_batches = bucket_batches
            module.datasets["train"].lengths = lambda epoch: np.arange(15) * 7 % 5
        ranks = [[batch[:, 0].tolist() for batch in module.train_dataloader()] for module in modules]
        assert {len(batch) for batches in ranks for batch in batches} == {6 // devices // accumulated}
        batches = [[index for share in shares for index in share] for shares in zip(*ranks, strict=True)]
        starts = range(0, len(batches), accumulated)
        return [sorted(index for batch in batches[start : start + accumulated] for index in batch) for start in starts]

    assert steps(devices, accumulated) == steps(1, 1)
    assert len(steps(1, 1)) == 2  # of 15 samples: three are left for another epoch


def test_a_run_goes_on_with_the_same_samples_on_another_number_of_devices():
    state = {"epoch": 2, "consumed": 6, "size": 15, "batches": 0}
    alone, half = _on(0, 1), _on(1, 2)
    for module in (alone, half):
        module.load_state_dict(state)
    (expected,), (shared,) = (list(module.train_dataloader()) for module in (alone, half))
    assert shared.tolist() == expected[1::2].tolist()


def test_a_batch_that_does_not_divide_is_refused_with_the_mend():
    with pytest.raises(ValueError, match=r"data\.batch_size=6 .* among 4 of them: .*data\.batch_size=8, or .*devices"):
        _on(0, 4).train_dataloader()


@pytest.mark.parametrize(
    ("batch_size", "devices", "accumulated", "mend"),
    [
        (
            128,
            3,
            1,
            "data.batch_size=129, or keep the sum by trainer.devices=2 trainer.accumulate_grad_batches=2, with 32",
        ),
        (128, 8, 3, "data.batch_size=144, or keep the sum by trainer.accumulate_grad_batches=4, with 4"),
        (
            8,
            16,
            1,
            "data.batch_size=16, or keep the sum by trainer.devices=8 trainer.accumulate_grad_batches=1, with 1",
        ),
    ],
)
def test_the_mend_of_a_batch_that_does_not_divide_keeps_the_sum(batch_size, devices, accumulated, mend):
    with pytest.raises(ValueError, match=re.escape(mend)):
        even_share(batch_size, devices, accumulated)
    offered = {name: int(value) for name, value in re.findall(r"trainer\.(\w+)=(\d+)", mend)}
    assert even_share(batch_size, offered.get("devices", devices), offered["accumulate_grad_batches"])


def test_a_task_that_does_not_accumulate_is_offered_devices_alone():
    with pytest.raises(ValueError, match=r"keep the sum by trainer\.devices=2, with 64 at a time"):
        even_share(128, 3, accumulates=False)
    data = _on(0, 1, accumulated=2)
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches=2: .* set it to 1"):
        data.say_share(data.trainer, accumulates=False)


def test_evaluation_order_is_fixed_and_complete():
    module = _KeyModule(0)
    loader = module.val_dataloader()
    passes = [torch.cat(list(loader))[:, 0].tolist() for _ in range(2)]
    assert passes[0] == passes[1]
    assert sorted(passes[0]) == list(range(15))
    assert module.test_dataloader() == []
    assert isinstance(module.train_dataloader(), DataLoader)


def test_indices_are_spread_evenly():
    assert evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evenly_spaced(3, 8) == [0, 1, 2]
    assert evenly_spaced(0, 8) == []
