"""Published text-to-audio systems, from the hub to a `System`, or to a pipeline of diffusers."""

from foley.published.ezaudio import PublishedEzAudio
from foley.published.generator import open_generator
from foley.published.hub import Hub
from foley.published.pipeline import PipelineToAudio, PublishedPipeline

__all__ = ["Hub", "PipelineToAudio", "PublishedEzAudio", "PublishedPipeline", "open_generator"]
