"""The same results on a CUDA device as on the CPU, as far as arithmetic allows; skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cosyvoice.config import read_config
from cosyvoice.decoder import SpeechDecoder
from stepaudio.chat.engine import StepAudio
from stepaudio.checkpoints import FLOW_DIR, TOKENIZER_DIR, TTS_DIR
from stepaudio.device import resolve_device
from stepaudio.lm.base import SamplingParams
from stepaudio.lm.local import LocalLM
from stepaudio.tts.engine import StepAudioTTS
from tokenizer.audio import read_audio
from tokenizer.dual import DualTokenizer

pytestmark = pytest.mark.gpu
CLIPS = ("clip0_22k.wav", "clip1_16k.wav", "clip2_48k_stereo.wav")


@pytest.fixture(scope="module")
def cuda() -> torch.device:
    return resolve_device("cuda")


def test_codes_agree(tiny, golden, cuda):
    clips = [read_audio(golden / "wavs" / name) for name in CLIPS]
    here = DualTokenizer.from_dir(tiny / TOKENIZER_DIR).encode(clips)
    there = DualTokenizer.from_dir(tiny / TOKENIZER_DIR, device=cuda).encode(clips)
    for a, b in zip(here, there):
        assert len(a) == len(b)
        assert np.mean(a.interleaved == b.interleaved) >= 0.99


def test_sound_agrees_in_float32(tiny, golden, cuda):
    clip = read_audio(golden / "wavs" / CLIPS[1])
    tokenizer = DualTokenizer.from_dir(tiny / TOKENIZER_DIR)
    codes = tokenizer.encode(clip)
    mels = []
    for device in (torch.device("cpu"), cuda):
        decoder = SpeechDecoder.from_dir(tiny / TTS_DIR / FLOW_DIR, device=device)
        prompt = decoder.voice_prompt(clip, tokenizer)
        noise = decoder.draw_noise(codes, prompt, 0)
        mels.append(decoder.token_to_mel([codes], [prompt], [noise])[0].float().cpu())
        assert len(decoder.decode(codes, prompt)) == mels[-1].shape[1] * 256
    assert (mels[0] - mels[1]).abs().max() < 1e-3


def test_the_recorded_flow_in_bfloat16(golden, cuda):
    config = read_config(golden / "flow" / "cosyvoice.yaml")
    from cosyvoice.flow import FlowRequest, TokenToMel

    model = TokenToMel.from_file(golden / "flow" / "flow.safetensors", config.flow, cuda, torch.bfloat16)
    inputs = load_file(golden / "flow" / "inputs.safetensors")
    expected = load_file(golden / "flow" / "golden_bf16.safetensors")["prompted.mel"].float()
    names = ("token", "prompt_token", "prompt_feat", "embedding", "z")
    with torch.inference_mode():
        [mel] = model.generate([FlowRequest(*(inputs[f"prompted.{name}"] for name in names))])
    assert (mel.float().cpu() - expected).abs().mean() < 0.05


def test_recorded_tokens(golden, cuda):
    folder = golden / "step1_lm" / "A"
    recorded = load_file(folder / "golden.safetensors")
    lm = LocalLM.from_dir(folder, device=cuda, dtype=torch.float32)
    params = SamplingParams(temperature=0.0, stop_ids=(), max_new_tokens=len(recorded["greedy"]))
    [done] = lm.generate([recorded["input_ids"].tolist()], [params])
    assert list(done.ids) == recorded["greedy"].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engines_speak(tiny, golden, cuda, dtype):
    speech = StepAudioTTS.from_dir(tiny, device=cuda, dtype=dtype).synthesize(
        "你好，世界。", speaker="Tingting", seed=1
    )
    assert speech.seconds > 0.1 and np.isfinite(speech.audio.samples).all()
    chat = StepAudio.from_dir(tiny, device=cuda, dtype=dtype)
    reply = chat.reply(
        [{"role": "user", "content": {"type": "audio", "audio": str(golden / "wavs" / CLIPS[0])}}], seed=2
    )
    assert reply.stop and isinstance(reply.text, str)
    assert isinstance(chat.transcribe(golden / "wavs" / CLIPS[1]), str)
