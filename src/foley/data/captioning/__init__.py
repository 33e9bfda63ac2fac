"""Captions by an audio-language model, by a language model from events with times, or imported."""
