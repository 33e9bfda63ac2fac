"""Rows out of the annotation files of published data sets."""
