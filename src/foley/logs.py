"""Loggers that speak on rank zero only."""

import logging

from pytorch_lightning.utilities import rank_zero_only


class _RankZeroFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return getattr(rank_zero_only, "rank", 0) == 0


def get_logger(name: str) -> logging.Logger:
    """A logger for module `name`; records of other ranks than zero are dropped."""
    logger = logging.getLogger(name)
    if not any(isinstance(existing, _RankZeroFilter) for existing in logger.filters):
        logger.addFilter(_RankZeroFilter())
    return logger
