"""How the vocoder runs: as written, or as one CUDA graph per shape, with fused residual blocks where they fit.

`plain` is `HiFTVocoder` itself and the oracle of the others. Everything is float32; only `precision="float16"`
rounds inside the residual blocks. Padding changes no result beyond the order of sums (samples within 1e-4, given the
same f0: its rounding is integrated into the phase). Legend: B batch, M mel bands, T mel frames, N = hop T samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cosyvoice.buckets import vocoder_bucket
from cosyvoice.flow_engine import choose
from cosyvoice.fused_vocoder import PRECISIONS, FusedVocoder, unsupported
from cosyvoice.hift import HiFTVocoder, SourceDraws, Vocoded
from tokenizer.errors import RequestError
from tokenizer.graphs import GraphPool

_GRAPHS = 40
_log = logging.getLogger(__name__)


class VocoderEngine:
    """`run` takes what `HiFTVocoder.forward` takes and gives the same, wherever it runs."""

    def __init__(self, vocoder: HiFTVocoder, engine: str = "auto", precision: str = "float32") -> None:
        if precision not in PRECISIONS:
            raise RequestError(f"vocoder precision {precision!r} is unknown: use {' or '.join(PRECISIONS)}")
        self.vocoder, self.device = vocoder, vocoder.conv_pre.weight.device
        self.engine = choose(engine, self.device, unsupported(vocoder))
        self.pool = GraphPool(self.device, _GRAPHS) if self.device.type == "cuda" else None
        self._forward: Callable[..., Vocoded] = vocoder
        if self.engine == "fused":
            self._forward = FusedVocoder(vocoder, precision)
        elif precision != "float32":
            _log.warning('vocoder precision "%s" needs the fused kernels: running in float32', precision)

    @torch.inference_mode()
    def run(self, mel: Tensor, draws: SourceDraws, lengths: Tensor | None = None, f0: Tensor | None = None) -> Vocoded:
        """mel [B, M, T] -> wave [B, N], f0 [B, T] and source [B, N], as `HiFTVocoder.forward`."""
        if self.engine == "plain":
            return self.vocoder(mel, draws, lengths, f0)
        batch, _, frames = mel.shape
        sizes = vocoder_bucket(batch, frames)
        rows, wide = sizes or (batch, frames)
        if lengths is None:
            lengths = torch.full((batch,), frames, device=mel.device)
        more, rest = rows - batch, wide - frames
        hop = self.vocoder.hop
        inputs = [
            F.pad(mel, (0, rest, 0, 0, 0, more)),
            F.pad(draws.phases, (0, 0, 0, more)),
            F.pad(draws.noise, (0, rest * hop, 0, 0, 0, more)),
            F.pad(lengths, (0, more), value=1),
        ]
        if f0 is not None:
            inputs.append(F.pad(f0, (0, rest, 0, more)))
        if sizes is None or self.pool is None:
            done = self.solve(*inputs)
        else:
            key = (*sizes, draws.noise.shape[1], f0 is not None)
            done = self.pool.run(key, self.solve, *inputs)
        wave, pitch, source = done
        return Vocoded(wave[:batch, : frames * hop], pitch[:batch, :frames], source[:batch, : frames * hop])

    def solve(
        self, mel: Tensor, phases: Tensor, noise: Tensor, lengths: Tensor, f0: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Padded tensors -> wave, f0, source; fixed shapes, no wait for the host."""
        return tuple(self._forward(mel, SourceDraws(phases, noise), lengths, f0))

    def pitch(self, mel: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Predicted f0 [B, T] in Hz of mel [B, M, T], by itself."""
        if self.engine == "plain":
            return self._pitch(mel, lengths)
        batch, _, frames = mel.shape
        sizes = vocoder_bucket(batch, frames)
        if sizes is None or self.pool is None:
            return self._pitch(mel, lengths)
        if lengths is None:
            lengths = torch.full((batch,), frames, device=mel.device)
        more = sizes[0] - batch
        padded = F.pad(mel, (0, sizes[1] - frames, 0, 0, 0, more))
        f0 = self.pool.run((*sizes, "pitch"), self._pitch, padded, F.pad(lengths, (0, more), value=1))
        return f0[:batch, :frames]

    @torch.inference_mode()
    def _pitch(self, mel: Tensor, lengths: Tensor | None) -> Tensor:
        mask = None
        if lengths is not None:
            mask = (torch.arange(mel.shape[2], device=mel.device) < lengths[:, None]).to(mel.dtype)[:, None]
        return self.vocoder.f0_predictor(mel if mask is None else mel * mask, mask)
