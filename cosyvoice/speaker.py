"""CAM++ speaker encoder: sound -> one embedding of the voice, through onnxruntime on the CPU.

Tensors of the ONNX file are addressed by position, because their names are not fixed by the
release. Source: formats.md 7.7, 13.13. Legend: T frames of 10 ms.
"""

from __future__ import annotations

import os

import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from torch import Tensor

from tokenizer.audio import TOKENIZER_RATE, Audio, resample
from tokenizer.errors import CheckpointError, RequestError
from tokenizer.fbank import NUM_MELS, kaldi_fbank
from tokenizer.files import require_file

MIN_SECONDS = 0.1
_LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


def speaker_features(samples: Tensor) -> Tensor:
    """16 kHz samples [N] in -1..1 -> Kaldi filter banks minus their mean over time, float32 [T, 80]."""
    fbank = kaldi_fbank(samples, window="povey")
    return fbank - fbank.mean(dim=0, keepdim=True)


class SpeakerEncoder:
    """campplus.onnx. `size` is the width of the embedding."""

    def __init__(self, session: onnxruntime.InferenceSession, source: str) -> None:
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if len(inputs) != 1 or not outputs or len(inputs[0].shape) != 3 or inputs[0].shape[2] != NUM_MELS:
            found = ", ".join(f"{tensor.name} {tensor.shape}" for tensor in inputs)
            raise CheckpointError(f"{source}: the speaker encoder must take one input [B, T, {NUM_MELS}], not {found}")
        self._session = session
        self._input, self._output = inputs[0].name, outputs[0].name
        self.size = outputs[0].shape[-1]

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], threads: int = 0) -> SpeakerEncoder:
        """Opens the ONNX file; `threads` 0 lets onnxruntime choose. Raises CheckpointError if it cannot."""
        path = require_file(path, "speaker encoder")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except _LOAD_ERRORS as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"speaker encoder: {path} is damaged or no ONNX model ({reason}): download it again"
            ) from None
        return cls(session, str(path))

    def embed(self, audio: Audio) -> Tensor:
        """Embedding of one voice, float32 [size], not normalised. Any sample rate, any level.

        Raises RequestError for a clip under 0.1 s: it holds too few frames for the statistics.
        """
        if audio.seconds < MIN_SECONDS:
            raise RequestError(
                f"a clip of {audio.seconds:.3f} s is too short to hear a voice in: give at least {MIN_SECONDS} s"
            )
        features = speaker_features(torch.from_numpy(resample(audio, TOKENIZER_RATE).samples))
        (embedding,) = self._session.run([self._output], {self._input: features[None].numpy()})
        return torch.from_numpy(embedding).float().reshape(-1)
