"""Loaders for a Lightning trainer (`use_distributed_sampler=False`), continued exactly after a restart."""

import signal
from collections.abc import Callable
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.loops.progress import _ProcessedTracker
from torch.utils.data import DataLoader, Dataset

from foley.core.logs import get_logger
from foley.core.numbers import COUNT, NumberRange
from foley.data.ordering import Arrangement, LengthBuckets, ResumableSampler, SamplerState, even_share, few_samples

_log = get_logger(__name__)


class ResumableDataModule(pl.LightningDataModule):
    """Loaders by split, and the state that continues training at the next batch.

    The position follows from the number of batches that the trainer has processed: neither what loaders have drawn
    ahead nor the trainer's count of epochs (which a restart at the end of an epoch may advance twice) matters.
    Training has a new order in every epoch; validation and test keep theirs. A step trains on the same samples however
    many processes share them, and in however many batches, so that the order goes on exactly on other devices too.

    Args:
        batch_size: samples of one optimizer step: of all processes, and of all batches that a step accumulates.
            ValueError where it does not divide among them.
        num_workers: loader processes; they persist between epochs, each two batches ahead. 0 loads in the training
            process. ValueError, as for a batch, where it is no whole number.
        pin_memory: batches lie where a GPU copies from while it computes.
        bucket_batches: batches hold clips of similar length, sorted within windows of this many batches over all ranks
            (see `LengthBuckets`); the data sets need a method `lengths(epoch)`. None: batches are random.
    """

    collate: Callable[..., Any]

    def __init__(
        self,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        pin_memory: bool = False,
        bucket_batches: int | None = None,
    ) -> None:
        super().__init__()
        COUNT.check("data.batch_size", batch_size)
        NumberRange(least=0, whole=True).check("data.num_workers", num_workers)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.pin_memory = pin_memory
        self.bucket_batches = bucket_batches
        self.datasets: dict[str, Dataset[Any]] = {}
        self._train_sampler: ResumableSampler | None = None
        self._batches_before = 0

    def setup(self, stage: str) -> None:
        """Say before training what it will go without; raises ValueError as `require_a_clip_each` does."""
        if self.trainer is not None:
            self.require_a_clip_each(self.trainer)
        if stage == "fit" and "val" not in self.datasets:
            _log.warning(
                "no clip is for validation: there will be no val/loss, no best checkpoint and no samples; "
                "name a split `val`, or set data.splits.val_fraction where the clips are read"
            )

    def require_a_batch(self) -> None:
        """Raise ValueError where the clips for training do not fill one batch; before a model is built for them."""
        size = len(self.datasets["train"]) if "train" in self.datasets else None  # type: ignore[arg-type]
        if size is not None and size < self.batch_size:
            raise ValueError(few_samples(size, self.batch_size))

    def say_share(self, trainer: pl.Trainer, accumulates: bool = True) -> None:
        """Log how a step's samples are shared out; arguments and ValueError are those of `even_share`.

        ValueError for accumulated batches, too, of a task that does not accumulate.
        """
        devices, batches = trainer.world_size, trainer.accumulate_grad_batches
        if batches > 1 and not accumulates:
            raise ValueError(
                f"trainer.accumulate_grad_batches={batches}: a task of a model and a discriminator updates both by "
                "every batch; set it to 1, and take more trainer.devices or a smaller data.batch_size"
            )
        share = even_share(self.batch_size, devices, batches, accumulates)
        _log.info(
            "a step trains on data.batch_size=%d clips: %d at a time (devices: %d, %s: %d)",
            *(self.batch_size, share, devices, "trainer.accumulate_grad_batches", batches),
        )

    def require_a_clip_each(self, trainer: pl.Trainer) -> None:
        """Raise ValueError where validation or test has less clips than there are processes: one would wait for ever.

        Known before the processes of a run are joined, so that none waits for another then.
        """
        limits = {"val": trainer.limit_val_batches, "test": trainer.limit_test_batches}
        for split, limit in limits.items():
            size = len(self.datasets[split]) if limit and split in self.datasets else None  # type: ignore[arg-type]
            if size is not None and size < trainer.world_size:
                raise ValueError(
                    f"split {split!r} has {size} clips for {trainer.world_size} processes, and each needs one: hold "
                    f"out more (data.splits.val_fraction), take trainer.devices={size} or less, or leave the split out "
                    f"with trainer.limit_{split}_batches=0"
                )

    @property
    def train_sampler(self) -> ResumableSampler:
        """The sampler of the training loader, made once so that a loaded state reaches it."""
        if self._train_sampler is None:
            self._train_sampler = self._sampler("train")
        return self._train_sampler

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", self.train_sampler)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._loader("val", self._sampler("val")) if "val" in self.datasets else []

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._loader("test", self._sampler("test")) if "test" in self.datasets else []

    def state_dict(self) -> dict[str, Any]:
        """The place in the order of samples after the batches that training has processed."""
        counts = {"batches": self._batches_processed(), "accumulated": self._accumulated()}
        return {**self.train_sampler.state_dict(), **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train_sampler.load_state_dict(cast(SamplerState, state_dict))
        now = self._accumulated()
        self._batches_before = state_dict["batches"] * now // state_dict.get("accumulated", now)

    def _batches_processed(self) -> int:
        """By this rank, since training began, in earlier runs too."""
        if self.trainer is None:
            return self._batches_before
        return cast(_ProcessedTracker, self.trainer.fit_loop.epoch_loop.batch_progress.total).processed

    def _batches_since(self) -> int:
        return self._batches_processed() - self._batches_before

    def _sampler(self, split: str) -> ResumableSampler:
        if split not in self.datasets:
            raise ValueError(f"the data has no split {split!r}, only {sorted(self.datasets)}")
        training = split == "train"
        size = len(self.datasets[split])  # type: ignore[arg-type]
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        accumulated = self._accumulated()
        return ResumableSampler(
            size,
            self.seed,
            self._share(),
            shuffle=training,
            drop_last=training,
            rank=rank,
            world_size=world_size,
            max_batches=self._max_batches(size // self.batch_size * accumulated) if training else None,
            progress=self._batches_since if training else _always_at_the_start,
            arrange=self._arrangement(split),
            accumulated=accumulated if training else 1,
        )

    def _accumulated(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    def _share(self) -> int:
        """Samples of a batch on this process; raises ValueError as `even_share` does."""
        return even_share(self.batch_size, self.trainer.world_size if self.trainer else 1, self._accumulated())

    def _arrangement(self, split: str) -> Arrangement | None:
        if self.bucket_batches is None:
            return None
        lengths: Callable[[int], Any] = self.datasets[split].lengths  # type: ignore[attr-defined]
        return LengthBuckets(lengths, self.bucket_batches, self.seed)

    def _max_batches(self, batches: int) -> int:
        """Batches that the trainer takes of an epoch of `batches`."""
        limit = self.trainer.limit_train_batches if self.trainer else 1.0
        return int(batches * limit) if isinstance(limit, float) else limit or batches

    def _loader(self, split: str, sampler: ResumableSampler) -> DataLoader[Any]:
        return DataLoader(
            self.datasets[split],
            batch_size=self._share(),
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.collate,
            pin_memory=self.pin_memory,
            worker_init_fn=leave_interrupts_to_training,
        )


def leave_interrupts_to_training(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; a loader that it ended would end the step in which it came."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _always_at_the_start() -> int:
    return 0
