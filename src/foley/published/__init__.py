"""Published text-to-audio systems, from the hub to a `System`."""

from foley.published.ezaudio import PublishedEzAudio
from foley.published.hub import Hub

__all__ = ["Hub", "PublishedEzAudio"]
