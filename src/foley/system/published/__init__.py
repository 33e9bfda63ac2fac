"""Published text-to-audio systems, from the hub to a `System`, or to a pipeline of diffusers."""

from foley.system.published.audio_pipelines import PublishedPipeline
from foley.system.published.ezaudio import PublishedEzAudio

__all__ = ["PublishedEzAudio", "PublishedPipeline"]
