"""How good generated sound is: named protocols, their extractors and scores, and distances between sets of features.

>>> from foley.core.config import PROJECT_ROOT
>>> protocol = load_protocol("embedded", PROJECT_ROOT / "data" / "extractor")
>>> protocol.sample_rate_hz, protocol.scores
(24000, ('frechet', 'frechet_infinity', 'kad', 'kl', 'inception'))
"""

from foley.metrics.distances import (
    extrapolated_distance,
    frechet_distance,
    gaussian_frechet_distance,
    kernel_audio_distance,
)
from foley.metrics.evaluation import (
    Accuracy,
    Evaluation,
    SilentAudioError,
    evaluate_audio,
    evaluate_features,
    evaluate_files,
)
from foley.metrics.features import ClipFeatures, ClipFile, LabelledAudio, extract_audio, extract_files, scan_directory
from foley.metrics.judge import Judge
from foley.metrics.latency import Latency, measure_latency, measure_rounds
from foley.metrics.pairing import PairingError
from foley.metrics.protocols import EvaluationProtocol, ProtocolError, load_protocol
from foley.metrics.reconstruction import mel_distance, si_sdr, stft_distance
from foley.metrics.references import read_clips
from foley.metrics.scores import Estimate, inception_scores, kl_sigmoid, kl_softmax

__all__ = [
    "Accuracy",
    "ClipFeatures",
    "ClipFile",
    "Estimate",
    "Evaluation",
    "EvaluationProtocol",
    "Judge",
    "LabelledAudio",
    "Latency",
    "PairingError",
    "ProtocolError",
    "SilentAudioError",
    "evaluate_audio",
    "evaluate_features",
    "evaluate_files",
    "extract_audio",
    "extract_files",
    "extrapolated_distance",
    "frechet_distance",
    "gaussian_frechet_distance",
    "inception_scores",
    "kernel_audio_distance",
    "kl_sigmoid",
    "kl_softmax",
    "load_protocol",
    "measure_latency",
    "measure_rounds",
    "mel_distance",
    "read_clips",
    "scan_directory",
    "si_sdr",
    "stft_distance",
]
