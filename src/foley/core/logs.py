"""Loggers that speak on rank zero only."""

import logging
import os
import sys
from collections.abc import Sequence

_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


def process_rank() -> int:
    """This process's rank; before the process group exists, what the launcher put into the environment, or 0."""
    # A process group exists only where PyTorch is loaded; a line of help must not load it.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return next((int(os.environ[name]) for name in _RANK_VARIABLES if name in os.environ), 0)


def first_few(names: Sequence[str], most: int = 5) -> str:
    """The first of many names, for a message that gives their number.

    >>> first_few(["a", "b", "c"]), first_few(["a", "b", "c"], most=2)
    ('a, b, c', 'a, b, ...')
    """
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


class _RankZeroFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return process_rank() == 0


def get_logger(name: str) -> logging.Logger:
    """A logger for module `name`; records of other ranks than zero are dropped."""
    logger = logging.getLogger(name)
    if not any(isinstance(existing, _RankZeroFilter) for existing in logger.filters):
        logger.addFilter(_RankZeroFilter())
    return logger
