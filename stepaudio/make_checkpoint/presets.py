"""Sizes of random-weight checkpoints: `tiny` for tests and demonstrations, `full` as released."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cosyvoice.campplus import CampPlusConfig
from cosyvoice.config import CosyVoiceConfig, EncoderConfig, EstimatorConfig, FlowConfig, HiFTConfig
from stepaudio.export.lm_files import SHARD_BYTES
from stepaudio.export.vocabulary import FIRST_TEXT
from stepaudio.lm.geometry import Geometry
from stepaudio.make_checkpoint.text_pieces import small_text, whole_text
from tokenizer.codes import LAYOUT
from tokenizer.sanm import SanmConfig
from tokenizer.semantic import SemanticConfig


@dataclass(frozen=True)
class Preset:
    """Everything that differs between checkpoints of different size."""

    linguistic: SanmConfig
    semantic: SemanticConfig
    decoder: CosyVoiceConfig
    speaker: CampPlusConfig
    chat: Geometry
    tts: Geometry
    text: Callable[[], dict[str, float]]  # text pieces of the vocabulary
    num_audio: int  # audio pieces
    audio_base: int | None  # id of <audio_0>; None: right after the text
    shard_bytes: int


def _tiny() -> Preset:
    pieces = FIRST_TEXT + len(small_text()) + LAYOUT.size
    lm = Geometry(
        vocab_size=pieces,
        hidden_size=48,
        intermediate_size=96,
        num_attention_heads=6,
        num_attention_groups=2,
        num_hidden_layers=2,
        max_seq_len=32768,
    )
    return Preset(
        linguistic=SanmConfig(size=64, heads=4, feed_forward=128, layers=3),
        semantic=SemanticConfig(width=48, num_heads=4, num_layers=2, mlp_width=96),
        decoder=CosyVoiceConfig(
            flow=FlowConfig(
                input_size=32,
                encoder=EncoderConfig(input_size=32, output_size=32, attention_heads=2, linear_units=64, num_blocks=2),
                estimator=EstimatorConfig(
                    channels=(32, 32), attention_head_dim=16, n_blocks=1, num_mid_blocks=2, num_heads=2
                ),
            ),
            hift=HiFTConfig(base_channels=32, f0_cond_channels=32),
        ),
        speaker=CampPlusConfig(growth_rate=4, bottleneck=2, init_channels=16, head_channels=8, block_layers=(3, 4, 3)),
        chat=lm,
        tts=lm,
        text=small_text,
        num_audio=LAYOUT.size,
        audio_base=None,
        shard_bytes=1_000_000,
    )


def _full() -> Preset:
    return Preset(
        linguistic=SanmConfig(),
        semantic=SemanticConfig(),
        decoder=CosyVoiceConfig(),
        speaker=CampPlusConfig(),
        chat=Geometry(
            vocab_size=74752,
            hidden_size=12288,
            intermediate_size=31232,
            num_attention_heads=96,
            num_attention_groups=8,
            num_hidden_layers=88,
            max_seq_len=32768,
        ),
        tts=Geometry(
            vocab_size=74752,
            hidden_size=3072,
            intermediate_size=8192,
            num_attention_heads=48,
            num_attention_groups=4,
            num_hidden_layers=32,
            max_seq_len=32768,
        ),
        text=whole_text,
        num_audio=9216,
        audio_base=LAYOUT.id_base,
        shard_bytes=SHARD_BYTES,
    )


PRESETS: dict[str, Callable[[], Preset]] = {"tiny": _tiny, "full": _full}
