"""Manifest entries out of tables, and rows out of the annotation files of published data sets."""

from foley.data.importers.tables import read_audiocaps, read_entries

__all__ = ["read_audiocaps", "read_entries"]
