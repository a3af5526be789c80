"""Codes + voice prompt -> sound: the flow model, then the vocoder.

Knows codes, not what is said. Every item has its own seed and its noise is drawn on the CPU, so that
neither batch neighbours nor the device change it. The flow runs in the caller's dtype (the release:
bfloat16), the vocoder always in float32. Source: formats.md 7.3, 7.5, 7.8; quirks Q6, Q7, Q31.
Legend: n codes, T1 prompt frames, T2 frames of the result, M mel bands.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cosyvoice.config import CosyVoiceConfig, read_config
from cosyvoice.flow import FlowRequest, TokenToMel, num_frames
from cosyvoice.flow_engine import FlowEngine
from cosyvoice.hift import HiFTVocoder, SourceDraws
from cosyvoice.prompt import VoicePrompt
from cosyvoice.speaker import SpeakerEncoder
from cosyvoice.vocoder_engine import VocoderEngine
from tokenizer.audio import Audio
from tokenizer.codes import AudioCodes
from tokenizer.errors import RequestError

if TYPE_CHECKING:
    from tokenizer.dual import DualTokenizer

FLOW_NAME, VOCODER_NAME, SPEAKER_NAME = "flow.pt", "hift.pt", "campplus.onnx"
_BATCH_FRAMES = 8192  # mel frames in one padded batch (95 s); a longer item runs alone

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class DecoderNoise:
    """All randomness of one item, on any device: what `SpeechDecoder.draw_noise` makes from a seed."""

    flow: Tensor  # [M, T1 + T2] standard normal, cast to the flow's dtype
    source: SourceDraws  # phases [1, H], noise [1, 1 or H, 256 * T2]


class SpeechDecoder:
    """Decodes single items and lists. The parts are injected; `from_dir` reads a released folder."""

    def __init__(
        self,
        config: CosyVoiceConfig,
        flow: TokenToMel,
        vocoder: HiFTVocoder,
        speaker_path: str | os.PathLike[str],
        engine: str = "auto",
        vocoder_precision: str = "float32",
    ) -> None:
        self.config, self.flow, self.vocoder = config, flow, vocoder
        self.vocoding = VocoderEngine(vocoder, engine, vocoder_precision)
        flow.engine = FlowEngine(flow, engine)
        self._speaker_path = Path(speaker_path)

    @classmethod
    def from_dir(
        cls,
        folder: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        engine: str = "auto",
        vocoder_precision: str = "float32",
    ) -> SpeechDecoder:
        """Loads `cosyvoice.yaml`, `flow.pt` and `hift.pt` (speech or music); `dtype` is the flow's.

        `engine`: "plain" runs the modules as they are written, "graph" captures them as CUDA graphs, "fused" does so
        with kernels of its own, "auto" takes the fastest that works here (on the CPU: plain). `vocoder_precision`
        "float16" lets the fused vocoder round as TF32 does, for twice its speed. Raises RequestError for an engine
        that cannot run and CheckpointError for missing, damaged or disagreeing files.
        """
        folder = Path(folder)
        config = read_config(folder)
        flow = TokenToMel.from_file(folder / FLOW_NAME, config.flow, device, dtype)
        vocoder = HiFTVocoder.from_file(folder / VOCODER_NAME, config.hift).to(device)
        return cls(config, flow, vocoder, folder / SPEAKER_NAME, engine, vocoder_precision)

    @property
    def sample_rate(self) -> int:
        """Of the sound that comes out, Hz."""
        return self.config.sample_rate

    @cached_property
    def speaker_encoder(self) -> SpeakerEncoder:
        """CAM++, opened when the first voice prompt is made."""
        return SpeakerEncoder.from_file(self._speaker_path)

    def voice_prompt(
        self, audio: Audio, tokenizer: DualTokenizer, seed: int = 0, *, dither: float = 1.0
    ) -> VoicePrompt:
        """Prompt of a recorded clip, see `VoicePrompt.from_audio`."""
        return VoicePrompt.from_audio(audio, tokenizer, self.speaker_encoder, self.config.mel, dither=dither, seed=seed)

    def draw_noise(self, codes: AudioCodes, prompt: VoicePrompt | None, seed: int) -> DecoderNoise:
        """The noise that `decode` uses for this item and seed."""
        generator = torch.Generator().manual_seed(seed)
        flow = torch.randn(self.config.flow.output_size, self._width(codes, prompt), generator=generator)
        source = SourceDraws.draw(self.config.hift, num_frames(len(codes), self.config.flow), generator)
        return DecoderNoise(flow, source)

    @overload
    def decode(
        self,
        codes: AudioCodes,
        prompt: VoicePrompt | None,
        seed: int = ...,
        num_steps: int = ...,
        noise: DecoderNoise | None = ...,
        timings: dict[str, float] | None = ...,
    ) -> Audio: ...

    @overload
    def decode(
        self,
        codes: Sequence[AudioCodes],
        prompt: VoicePrompt | Sequence[VoicePrompt | None] | None,
        seed: int | Sequence[int] = ...,
        num_steps: int = ...,
        noise: Sequence[DecoderNoise | None] | None = ...,
        timings: dict[str, float] | None = ...,
    ) -> list[Audio]: ...

    def decode(self, codes, prompt, seed=0, num_steps=10, noise=None, timings=None):
        """Sound of one item or of a list, 256 * int(n / 41.667 * 22050 / 256) samples each.

        With a list, `prompt` and `seed` are one for all or one per item; an item sounds the same
        alone and in a list. `noise` replaces the seeds. Codes that break the 2:3 pattern are
        decoded as they are, with a warning. `timings` gains the seconds of "flow" and "vocoder".
        Raises RequestError for empty codes, counts that differ and noise of a wrong shape.
        """
        if isinstance(codes, AudioCodes):
            single_noise = None if noise is None else [noise]
            return self.decode([codes], [prompt], [seed], num_steps, single_noise, timings)[0]
        prompts = _per_item(prompt, len(codes), "prompts")
        seeds = _per_item(seed, len(codes), "seeds")
        given = _per_item(noise, len(codes), "noises")
        _check_codes(codes)
        done: dict[int, Audio] = {}
        for batch in _batches([self._width(*item) for item in zip(codes, prompts)]):
            draws = [given[i] or self.draw_noise(codes[i], prompts[i], seeds[i]) for i in batch]
            mels = self.token_to_mel([codes[i] for i in batch], [prompts[i] for i in batch], draws, num_steps, timings)
            done.update(zip(batch, self.mel_to_audio(mels, [draw.source for draw in draws], timings)))
        return [done[i] for i in range(len(codes))]

    @torch.inference_mode()
    def token_to_mel(
        self,
        codes: Sequence[AudioCodes],
        prompts: Sequence[VoicePrompt | None],
        noise: Sequence[DecoderNoise],
        num_steps: int = 10,
        timings: dict[str, float] | None = None,
    ) -> list[Tensor]:
        """Mel [M, T2] of each item in the flow's dtype, without the prompt's part; one padded batch."""
        requests = [self._request(*item) for item in zip(codes, prompts, noise)]
        with self._timed(timings, "flow"):
            return self.flow.generate(requests, num_steps)

    @torch.inference_mode()
    def mel_to_audio(
        self, mels: Sequence[Tensor], draws: Sequence[SourceDraws], timings: dict[str, float] | None = None
    ) -> list[Audio]:
        """Sound of mels [M, T2] of any dtype, clamped to +-0.99; one padded batch."""
        device, hop = self._device, self.vocoder.hop
        sizes = [mel.shape[1] for mel in mels]
        for draw, size in zip(draws, sizes):
            _check_draws(draw, self.config.hift.nb_harmonics + 1, size * hop)
        with self._timed(timings, "vocoder"):
            lengths = None if len(set(sizes)) == 1 else torch.tensor(sizes, device=device)
            mel = pad_sequence([mel.float().T for mel in mels], batch_first=True).transpose(1, 2).to(device)
            waves = self.vocoding.run(mel, SourceDraws.batch(draws).to(device), lengths).wav.cpu().numpy()
        return [Audio(wave[: size * hop], self.sample_rate) for wave, size in zip(waves, sizes)]

    @property
    def _device(self) -> torch.device:
        return self.vocoder.conv_pre.weight.device

    def _width(self, codes: AudioCodes, prompt: VoicePrompt | None) -> int:
        """Mel frames of prompt and result, T1 + T2."""
        return num_frames(len(codes), self.config.flow) + (0 if prompt is None else len(prompt.mel))

    def _request(self, codes: AudioCodes, prompt: VoicePrompt | None, noise: DecoderNoise) -> FlowRequest:
        if prompt is None:
            flow = self.config.flow
            prompt = VoicePrompt(AudioCodes([]), torch.zeros(0, flow.output_size), torch.zeros(flow.spk_embed_dim))
        return FlowRequest(
            torch.from_numpy(codes.interleaved.copy()),
            torch.from_numpy(prompt.codes.interleaved.copy()),
            prompt.mel,
            prompt.embedding,
            noise.flow,
        )

    @contextmanager
    def _timed(self, timings: dict[str, float] | None, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if timings is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            timings[stage] = timings.get(stage, 0.0) + time.perf_counter() - begin


def _per_item(value: object, count: int, name: str) -> list:
    """A value for all items or a list of one per item -> a list of one per item."""
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise RequestError(f"{count} items but {len(values)} {name}: give one, or one per item")
    return values


def _check_codes(items: Sequence[AudioCodes]) -> None:
    for i, codes in enumerate(items):
        label = f"item {i}: " if len(items) > 1 else ""
        if len(codes) == 0:
            raise RequestError(f"{label}nothing to decode: the list of audio codes is empty")
        at = codes.first_break()
        if at is not None:
            logger.warning(
                "%saudio code %d at position %d breaks the 2:3 pattern of linguistic and semantic codes: "
                "decoded as it is, expect noise there",
                label,
                codes.interleaved[at],
                at,
            )


def _check_draws(draws: SourceDraws, sines: int, samples: int) -> None:
    found = tuple(draws.phases.shape), tuple(draws.noise.shape)
    if found[0] != (1, sines) or found[1] not in ((1, 1, samples), (1, sines, samples)):
        raise RequestError(
            f"source noise has the shapes {found[0]} and {found[1]}, this item takes "
            f"{(1, sines)} and {(1, 1, samples)} or {(1, sines, samples)}"
        )


def _batches(sizes: Sequence[int]) -> list[list[int]]:
    """Indices of items of similar size, grouped so that a padded group holds at most `_BATCH_FRAMES`."""
    groups: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        if groups and sizes[i] * (len(groups[-1]) + 1) <= _BATCH_FRAMES:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
