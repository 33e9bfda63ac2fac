"""Codecs, audio `[B, 1, T]` to a latent `[B, C, L]` and back: on waveforms, on spectra, on mel spectrograms.

`base.AudioVAE` says what a codec gives; `mel_codec` joins the mel VAE and the vocoder into one.
"""
