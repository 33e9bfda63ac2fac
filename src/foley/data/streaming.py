"""Training on a stream of clips that nobody can index: shared out over devices and workers, each clip once, resumed.

Every process reads the whole stream of its workers and decodes its own share. So all of them see the same number of
batches, on which their steps depend, and no clip is trained on twice in an epoch. The library's own state of a stream
does not hold what lies in its shuffle buffer, and would lose or repeat that. So a resumed epoch is read again up to
where it stopped, undecoded: which rows come is a function of the seed and the epoch.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from foley.core.logs import get_logger
from foley.data.audio import AudioError
from foley.data.dataset import (
    AudioBatch,
    AudioCollate,
    AudioDataset,
    AudioItem,
    Augmentation,
    DataFaultError,
    PeakLevel,
    RmsLevel,
    SampleKey,
    most_faults,
)
from foley.data.resumable import ResumableDataModule, leave_interrupts_to_training

_log = get_logger(__name__)
_FEWEST_FAULTS = 10  # before their share of a stream, whose length nobody knows, says anything


class RowReader(Protocol):
    """How a row becomes a clip, such as `foley.data.hub_datasets.HubColumns`."""

    def item(self, row: Mapping[str, Any], features: Mapping[str, Any], place: str) -> AudioItem: ...


class _NoClips:
    """The source of an `AudioDataset` that only prepares what others read."""

    def __init__(self, sample_rate_hz: int) -> None:
        self.sample_rate_hz = sample_rate_hz

    def __len__(self) -> int:
        return 0

    def render(self, index: int, epoch: int) -> AudioItem:
        raise AudioError(str(index), "a stream has no index")


class StreamedClips(IterableDataset[AudioItem]):
    """This process's share of a stream, prepared as `AudioDataset` prepares clips.

    The rows of each worker are taken in steps of `share * world_size`; rank r decodes the r-th part of a step. A clip
    that cannot be used is replaced by another one of its part, or by the last good one.

    Args:
        stream: a `datasets.IterableDataset`; inside a worker it yields the rows of that worker.
        reader: makes a clip of a row.
        prepare: level, crop and augmentation, keyed by epoch and number.
        share: samples of a batch of one process.
        whole_steps: leave out a last step that is not whole.
    """

    def __init__(
        self,
        stream: Any,
        reader: RowReader,
        prepare: Callable[[AudioItem, SampleKey], AudioItem],
        share: int,
        name: str,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        whole_steps: bool = True,
        max_fault_fraction: float = 0.05,
    ) -> None:
        self.stream, self.reader, self.prepare, self.name = stream, reader, prepare, name
        self.share, self.rank, self.world_size = share, rank, world_size
        self.whole_steps, self.max_fault_fraction = whole_steps, max_fault_fraction
        # The epoch, and how many rows of each worker are behind: in shared memory, for workers outlive epochs.
        self._place = torch.zeros(1 + max(1, num_workers), dtype=torch.int64).share_memory_()
        self._last: AudioItem | None = None
        self._faults = 0

    def begin_at(self, epoch: int, rows: Mapping[int, int]) -> None:
        """Where the next iteration begins: `rows` of each worker have been trained on."""
        self._place[0] = epoch
        self._place[1:] = torch.tensor([rows.get(worker, 0) for worker in range(len(self._place) - 1)])

    def __iter__(self) -> Iterator[AudioItem]:
        worker = _worker()
        epoch, behind = int(self._place[0]), int(self._place[1 + worker])
        self.stream.set_epoch(epoch)
        step: list[tuple[int, Mapping[str, Any]]] = []
        for number, row in enumerate(self.stream):
            if number < behind:
                continue
            step.append((number, row))
            if len(step) == self.share * self.world_size:
                yield from self._decode(step, epoch, worker)
                step = []
        if step and not self.whole_steps and self.world_size == 1:
            yield from self._decode(step, epoch, worker)

    def _decode(self, step: list[tuple[int, Mapping[str, Any]]], epoch: int, worker: int) -> list[AudioItem]:
        """The part of this rank, `share` clips or what there is; raises DataFaultError."""
        part = step[self.rank * self.share : (self.rank + 1) * self.share]
        read = [self._read(number, row, epoch, worker) for number, row in part]
        good = [item for item in read if item is not None]
        self._last = good[-1] if good else self._last
        if self._last is None:
            raise DataFaultError(f"none of the first {len(part)} clips of {self.name} can be used; see the warnings")
        spare = good or [self._last]
        return [spare[place % len(spare)] if item is None else item for place, item in enumerate(read)]

    def _read(self, number: int, row: Mapping[str, Any], epoch: int, worker: int) -> AudioItem | None:
        place = f"{self.name}/{worker}-{number}"
        try:
            item = self.reader.item(row, self.stream.features, place)
            return self.prepare(item, SampleKey(number * (len(self._place) - 1) + worker, epoch))
        except AudioError as error:
            self._faults += 1
            _log.warning("skipping a clip (%d so far): %s", self._faults, error)
            if self._faults > max(_FEWEST_FAULTS, most_faults(number, self.max_fault_fraction)):
                raise DataFaultError(
                    f"{self._faults} of {number + 1} clips of {self.name} cannot be used, more than the fraction "
                    f"{self.max_fault_fraction:g} (data.max_fault_fraction); mend them, or raise it"
                ) from error
            return None


def _worker() -> int:
    info = get_worker_info()
    return 0 if info is None else info.id


class _CollateWithWorker:
    """A batch that says which worker made it."""

    def __init__(self, collate: Callable[..., AudioBatch]) -> None:
        self.collate = collate

    def __call__(self, items: list[AudioItem]) -> dict[str, Any]:
        return {**self.collate(items), "worker": _worker()}


class _StreamLoader(DataLoader[AudioItem]):
    """Begins each epoch where `start` says, and tells `note` which worker each batch is of."""

    def __init__(
        self,
        clips: StreamedClips,
        start: Callable[[], tuple[int, Counter[int]]],
        note: Callable[[int], None],
        **options: Any,
    ) -> None:
        super().__init__(clips, **options)
        self.clips, self.start, self.note = clips, start, note

    def __iter__(self) -> Any:
        epoch, behind = self.start()
        begun = False
        for batch in self._epoch(epoch, behind):
            begun = True
            yield batch
        if behind and not begun:  # saved at the very end of its epoch
            yield from self._epoch(*self.start())

    def _epoch(self, epoch: int, behind: Counter[int]) -> Iterator[dict[str, Any]]:
        self.clips.begin_at(epoch, behind)
        for batch in super().__iter__():
            self.note(batch.pop("worker"))
            yield batch


class StreamedDataModule(ResumableDataModule):
    """Batches of captioned audio (`AudioBatch`) out of streams; after a restart they go on with what is left.

    With loader processes, which take turns, the first batches after a restart may come in another order than they would
    have; with another number of them the epoch begins anew.

    Args:
        streams: of `datasets`, undecoded, under train, val and test; only "train" is needed, and mixed.
        reader: makes a clip of a row.
        shuffle_buffer: rows that are mixed at a time.
        Others: as `foley.data.datamodule.AudioDataModule` takes them.
    """

    def __init__(
        self,
        streams: Mapping[str, Any],
        reader: RowReader,
        sample_rate_hz: int,
        duration_seconds: float,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        level: PeakLevel | RmsLevel | None = None,
        augmentation: Augmentation | None = None,
        drop_silent: bool = False,
        max_fault_fraction: float = 0.05,
        pin_memory: bool = False,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, pin_memory)
        self.sample_rate_hz, self.duration_seconds, self.reader = sample_rate_hz, duration_seconds, reader
        self.max_fault_fraction = max_fault_fraction
        self.streams = {
            name: stream.shuffle(seed=seed, buffer_size=shuffle_buffer) if name == "train" else stream
            for name, stream in streams.items()
        }
        num_samples = round(duration_seconds * sample_rate_hz)
        self.collate = AudioCollate(num_samples)
        # Without a clip of their own: they prepare what the stream brings.
        self.datasets = {
            name: AudioDataset(
                *(_NoClips(sample_rate_hz), num_samples, seed, level, augmentation if name == "train" else None),
                *(name == "train", drop_silent),
            )
            for name in self.streams
        }
        self._epoch, self._behind = 0, Counter[int]()  # where the epoch of now began: rows of each worker
        self._next: tuple[int, Counter[int]] = (0, Counter())
        self._order: list[int] = []  # the worker of each batch of this epoch, those that were drawn ahead too
        self._before_epoch = 0

    def require_a_batch(self) -> None:
        """How many clips a stream has is known at its end."""

    def require_a_clip_each(self, trainer: Trainer) -> None:
        """As `require_a_batch`: a last step that has not a clip for each process is left out."""

    def train_dataloader(self) -> DataLoader[Any]:
        return _StreamLoader(self._clips("train"), self._begin, self._order.append, **self._options())

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._in_order("val")

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        return self._in_order("test")

    def whole_clips(self, max_duration_seconds: float) -> dict[str, AudioDataset]:
        """Raises ValueError: what is encoded is asked for by its number."""
        raise ValueError(
            "data.streaming=true: a stream cannot be encoded, for its clips have no numbers; set it to false"
        )

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and the rows of each worker that training is done with."""
        done = Counter(self._order[: self._batches_processed() - self._before_epoch])
        rows = {str(worker): self._behind[worker] + count * self._unit() for worker, count in done.items()}
        rows = {**{str(worker): count for worker, count in self._behind.items()}, **rows}
        return {"epoch": self._epoch, "rows": rows, "workers": self.num_workers, "batches": self._batches_processed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rows = Counter({int(worker): count for worker, count in state_dict["rows"].items()})
        if state_dict["workers"] != self.num_workers:
            _log.warning(
                "the stream was read by %d workers (data.num_workers), and is by %d now: epoch %d begins anew",
                *(state_dict["workers"], self.num_workers, state_dict["epoch"]),
            )
            rows.clear()
        self._next = state_dict["epoch"], rows
        self._batches_before = state_dict["batches"]

    def _begin(self) -> tuple[int, Counter[int]]:
        """The place of the next epoch, which is that of now from here on."""
        self._epoch, self._behind = self._next
        self._next = self._epoch + 1, Counter()
        self._order.clear()
        self._before_epoch = self._batches_processed()
        return self._epoch, self._behind

    def _unit(self) -> int:
        """Rows of a step of all processes, of one batch each."""
        return self._share() * (self.trainer.world_size if self.trainer else 1)

    def _clips(self, name: str, num_workers: int | None = None) -> StreamedClips:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        workers = self.num_workers if num_workers is None else num_workers
        given = (
            self.streams[name],
            self.reader,
            cast(AudioDataset, self.datasets[name]).prepared,
            self._share(),
            name,
            workers,
        )
        return StreamedClips(*given, rank, world_size, name == "train", self.max_fault_fraction)

    def _options(self) -> dict[str, Any]:
        return {
            "batch_size": self._share(),
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "collate_fn": _CollateWithWorker(self.collate),
            "pin_memory": self.pin_memory,
            "worker_init_fn": leave_interrupts_to_training,
            "drop_last": True,
        }

    def _in_order(self, name: str) -> DataLoader[Any] | list[Any]:
        if name not in self.streams:
            return []
        options = {**self._options(), "drop_last": False, "collate_fn": self.collate}
        return DataLoader(self._clips(name), **options)
