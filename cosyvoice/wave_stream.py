"""Mel -> sound in chunks: the vocoder run over a few known frames again, its source going on where it was.

Knows mels and noise, nothing of codes. The vocoder is made of convolutions, so frames farther away than
`CONTEXT` change nothing: a chunk is vocoded with so many frames before it, and with whatever is known of the
frames behind it. The noise belongs to absolute samples. The phase of the sines is a running sum of f0: the
state carries it, and the f0 of the frames heard before, so that a chunk's sines meet those of the last one.
Source: formats.md 7.5. Legend: T frames of one chunk, M mel bands, N = hop * T samples, H sines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cosyvoice.config import HiFTConfig
from cosyvoice.hift import HiFTVocoder, SourceDraws, hop_length
from cosyvoice.vocoder_engine import VocoderEngine

CONTEXT = 18  # frames: what the source and the mel reach (15) and a margin; f0 is not predicted anew for them
_BLOCK = 32  # frames of noise drawn at a time
_FLOW, _PROMPT, _SOURCE, _PHASES = range(4)


def frame_noise(seed: int, lane: int, first: int, last: int, width: int) -> Tensor:
    """Standard normal [last - first, width] of absolute frames; a frame's numbers depend on nothing but its place."""
    begin, end = first // _BLOCK, -(-last // _BLOCK)
    blocks = [torch.randn(_BLOCK, width, generator=_generator(seed, lane, block)) for block in range(begin, end)]
    rows = torch.cat(blocks) if blocks else torch.zeros(0, width)
    return rows[first - begin * _BLOCK : last - begin * _BLOCK]


def flow_noise(seed: int, prompt_frames: int, first: int, last: int, bands: int) -> Tensor:
    """Noise of the flow for a prompt of so many frames and the frames first..last, [M, T1 + last - first].

    The prompt's is counted from its end, so that a shortened prompt keeps the noise of what is left of it.
    """
    prompt = frame_noise(seed, _PROMPT, 0, prompt_frames, bands).flip(0)
    return torch.cat([prompt, frame_noise(seed, _FLOW, first, last, bands)]).T.contiguous()


def source_draws(seed: int, first: int, last: int, config: HiFTConfig) -> SourceDraws:
    """Randomness of the harmonic source for the frames first..last of a stream, B = 1."""
    phases = torch.rand(1, config.nb_harmonics + 1, generator=_generator(seed, _PHASES, 0)) * 2 - 1
    noise = frame_noise(seed, _SOURCE, first, last, hop_length(config))
    return SourceDraws(phases * math.pi, noise.reshape(1, 1, -1))


def _generator(seed: int, lane: int, block: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed * 1_000_003 + lane) * 1_000_003 + block) % 2**63)


@dataclass(frozen=True, eq=False)
class WaveState:
    """Where a stream of sound is; never changed in place, so that keeping one is a snapshot."""

    frame: int  # frames heard so far
    mel: Tensor  # [M, c] the last of them, at most CONTEXT
    f0: Tensor  # [c] Hz, theirs, on the CPU
    cycles: float  # phase of the fundamental where those frames begin, 0 to 1
    tail: Tensor  # [n] samples behind the last one heard, to fade out, on the CPU

    @classmethod
    def start(cls, bands: int) -> WaveState:
        return cls(0, torch.zeros(bands, 0), torch.zeros(0), 0.0, torch.zeros(0))


@dataclass(frozen=True, eq=False)
class WaveChunk:
    """The next frames of one stream: `heard` of them become sound now, the rest is a first look at what follows."""

    state: WaveState
    mel: Tensor  # [M, T]
    heard: int
    seed: int


@torch.inference_mode()
def vocode(vocoding: VocoderEngine, chunks: Sequence[WaveChunk], fade: int) -> list[tuple[Tensor, WaveState]]:
    """Samples [hop * heard] on the CPU and the next state of each chunk, as one padded batch.

    `fade` is how many samples of the first look are kept to fade over into the next chunk.
    """
    vocoder, device = vocoding.vocoder, vocoding.device
    mels = [torch.cat([chunk.state.mel.to(device), chunk.mel.to(device).float()], dim=1) for chunk in chunks]
    sizes = [mel.shape[1] for mel in mels]
    lengths = None if len(set(sizes)) == 1 else torch.tensor(sizes, device=device)
    mel = pad_sequence([mel.T for mel in mels], batch_first=True).transpose(1, 2).contiguous()
    f0, sung = _pitch(vocoding, mel, chunks, lengths)
    draws = [
        source_draws(c.seed, c.state.frame - c.state.mel.shape[1], c.state.frame + c.mel.shape[1], vocoder.config)
        for c in chunks
    ]
    waves = vocoding.run(mel, SourceDraws.batch(draws).to(device), lengths, sung).wav.cpu()
    f0 = f0.cpu()
    return [
        _heard(chunk, mels[i], f0[i], waves[i, : sizes[i] * vocoder.hop], vocoder, fade)
        for i, chunk in enumerate(chunks)
    ]


def _pitch(
    vocoding: VocoderEngine, mel: Tensor, chunks: Sequence[WaveChunk], lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """f0 [B, T] as it is, and as the source takes it: the first known frame brings the phase to where it was.

    That frame lies farther back than anything heard from now on reaches; its own sound is not used.
    """
    predicted = vocoding.pitch(mel, lengths)
    known = [chunk.state.f0.to(mel.device) for chunk in chunks]
    f0 = torch.stack([torch.cat([old, row[len(old) :]]) for old, row in zip(known, predicted)])
    sung = f0.clone()
    per_frame = vocoding.vocoder.config.sampling_rate / vocoding.vocoder.hop  # Hz that make one cycle in a frame
    for row, chunk in enumerate(chunks):
        sung[row, 0] += ((chunk.state.cycles + 0.5) % 1 - 0.5) * per_frame
    return f0, sung


def _heard(
    chunk: WaveChunk, mel: Tensor, f0: Tensor, wave: Tensor, vocoder: HiFTVocoder, fade: int
) -> tuple[Tensor, WaveState]:
    """Cuts what is heard out of one vocoded chunk and keeps what the next one needs."""
    state, hop = chunk.state, vocoder.hop
    known = state.mel.shape[1]
    end = known + chunk.heard
    samples = cross_fade(state.tail, wave[known * hop : end * hop])
    begin = max(0, end - CONTEXT)
    steps = f0[:begin].double() * hop / vocoder.config.sampling_rate
    cycles = (state.cycles + float(steps.sum())) % 1
    tail = wave[end * hop : end * hop + fade].clone()
    return samples, WaveState(state.frame + chunk.heard, mel[:, begin:end].clone(), f0[begin:end].clone(), cycles, tail)


def cross_fade(old: Tensor, new: Tensor) -> Tensor:
    """`new` [..., n], its beginning blended with `old` [..., m]: raised-cosine weights that sum to one."""
    size = min(old.shape[-1], new.shape[-1])
    if size == 0:
        return new
    rise = torch.sin((torch.arange(size, device=new.device) + 0.5) * (math.pi / 2 / size)).square().to(new.dtype)
    blended = old[..., :size].to(new) * (1 - rise) + new[..., :size] * rise
    return torch.cat([blended, new[..., size:]], dim=-1)
