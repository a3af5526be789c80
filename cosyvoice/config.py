"""`cosyvoice.yaml` -> frozen configurations of the flow, the vocoder and the prompt mel.

Knows the release's keys, their defaults and which structures are built here; knows no module and runs nothing
of the file. A missing key takes the release's value (formats.md section 7.1), an unknown key or a structure that
is not built here is refused by name. Training-only keys (dropouts, losses) are ignored.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from cosyvoice.yaml_data import Section, read_yaml

CONFIG_NAME = "cosyvoice.yaml"


@dataclass(frozen=True)
class EncoderConfig:
    """Conformer over token embeddings: relative positions, no convolution module, pre-norm."""

    input_size: int = 512  # width of the token embedding
    output_size: int = 512  # width inside, even
    attention_heads: int = 8
    linear_units: int = 2048  # width of the feed-forward layer
    num_blocks: int = 6


@dataclass(frozen=True)
class EstimatorConfig:
    """UNet that estimates the flow's velocity."""

    in_channels: int = 320  # x, mu, speaker and condition, output_size each
    out_channels: int = 80
    channels: tuple[int, ...] = (256, 256)  # full rate, half rate; multiples of 8 (GroupNorm)
    attention_head_dim: int = 64
    n_blocks: int = 4  # transformer blocks after each ResNet block
    num_mid_blocks: int = 12  # ResNet + transformer stacks at half rate
    num_heads: int = 8


@dataclass(frozen=True)
class FlowConfig:
    """Token-to-mel model."""

    input_size: int = 512  # width of the token embedding
    output_size: int = 80  # mel bins
    spk_embed_dim: int = 192  # speaker embedding
    vocab_size: int = 5120  # interleaved codes
    input_frame_rate: float = 41.667  # codes per second
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    regulator_layers: int = 4  # convolutions of the length regulator (its sampling_ratios, all 1)
    inference_cfg_rate: float = 0.7  # classifier-free guidance: (1 + r) conditional - r unconditional
    training_cfg_rate: float = 0.2  # share of training items without condition
    sigma_min: float = 1e-6  # noise left at the end of the training path
    sample_rate: int = 22050  # Hz, of the mel (feat_extractor)
    hop_size: int = 256  # samples per mel frame (feat_extractor)


@dataclass(frozen=True)
class HiFTConfig:
    """HiFT vocoder: harmonic source, upsampling, inverse STFT."""

    in_channels: int = 80  # mel bins
    base_channels: int = 512  # halved by each upsampling
    nb_harmonics: int = 8  # above the fundamental
    sampling_rate: int = 22050  # Hz
    nsf_alpha: float = 0.1  # amplitude of the sines
    nsf_sigma: float = 0.003  # noise added where voiced
    nsf_voiced_threshold: float = 10.0  # Hz; f0 above it is voiced
    upsample_rates: tuple[int, ...] = (8, 8)
    upsample_kernel_sizes: tuple[int, ...] = (16, 16)  # kernel - rate is even: lengths multiply exactly
    istft_n_fft: int = 16
    istft_hop_len: int = 4
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    source_resblock_kernel_sizes: tuple[int, ...] = (7, 11)  # one per upsampling
    source_resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5))
    lrelu_slope: float = 0.1
    audio_limit: float = 0.99  # the wave is clamped to +- this
    f0_cond_channels: int = 512  # width of the f0 predictor


@dataclass(frozen=True)
class MelConfig:
    """Log-mel of prompts and training targets."""

    n_fft: int = 1024
    num_mels: int = 80
    sampling_rate: int = 22050  # Hz
    hop_size: int = 256  # samples
    win_size: int = 1024  # samples
    fmin: float = 0.0  # Hz
    fmax: float = 8000.0  # Hz; null in the file means half the sampling rate


@dataclass(frozen=True)
class CosyVoiceConfig:
    """Everything `cosyvoice.yaml` says about the decoder."""

    flow: FlowConfig = field(default_factory=FlowConfig)
    hift: HiFTConfig = field(default_factory=HiFTConfig)
    mel: MelConfig = field(default_factory=MelConfig)

    @property
    def sample_rate(self) -> int:
        """Of the sound that comes out, Hz."""
        return self.hift.sampling_rate


def read_config(folder: str | os.PathLike[str]) -> CosyVoiceConfig:
    """Reads `cosyvoice.yaml` of a decoder folder (or the yaml file itself) as data.

    Raises CheckpointError naming file, key, value and what is supported.
    """
    path = Path(folder)
    top = read_yaml(path if path.is_file() else path / CONFIG_NAME)
    mel = _mel(top.section("feat_extractor", "mel_spectrogram"))
    return CosyVoiceConfig(
        flow=_flow(top.section("flow", "MaskedDiffWithXvec"), mel),
        hift=_hift(top.section("hift", "HiFTGenerator"), mel),
        mel=mel,
    )


def _mel(section: Section) -> MelConfig:
    section.expect("center", False)
    if section.is_null("fmax"):
        mel = section.fill(MelConfig, fmax=section.value("sampling_rate", MelConfig.sampling_rate) / 2)
    else:
        mel = section.fill(MelConfig)
    if not mel.fmin < mel.fmax <= mel.sampling_rate / 2:
        section.refuse("fmax", mel.fmax, f"above fmin ({mel.fmin}) and at most {mel.sampling_rate / 2}")
    if mel.win_size > mel.n_fft:
        section.refuse("win_size", mel.win_size, f"at most n_fft ({mel.n_fft})")
    if mel.hop_size > mel.n_fft:
        section.refuse("hop_size", mel.hop_size, f"at most n_fft ({mel.n_fft})")
    section.finish()
    return mel


def _flow(section: Section, mel: MelConfig) -> FlowConfig:
    size = section.value("output_size", FlowConfig.output_size)
    if size != mel.num_mels:
        section.refuse("output_size", size, f"feat_extractor.num_mels ({mel.num_mels})")
    decoder = section.section("decoder", "ConditionalCFM")
    flow = section.fill(
        FlowConfig,
        **_solver(decoder.section("cfm_params", "DictConfig")),
        encoder=_encoder(section.section("encoder", "ConformerEncoder")),
        estimator=_estimator(decoder.section("estimator", "ConditionalDecoder"), size),
        regulator_layers=_regulator(section.section("length_regulator", "InterpolateRegulator"), size),
        sample_rate=mel.sampling_rate,
        hop_size=mel.hop_size,
    )
    if flow.input_frame_rate == 0:
        section.refuse("input_frame_rate", 0, "codes per second, above 0")
    if flow.input_size != flow.encoder.input_size:
        section.refuse("input_size", flow.input_size, f"flow.encoder.input_size ({flow.encoder.input_size})")
    section.expect("output_type", "mel")
    decoder.expect("n_spks", 1)
    decoder.expect("spk_emb_dim", size)
    decoder.finish(ignored=("in_channels",))
    section.finish(ignored=("only_mask_loss", "decoder_conf", "mel_feat_conf"))
    return flow


def _encoder(section: Section) -> EncoderConfig:
    section.expect("normalize_before", True)
    section.expect("input_layer", "linear")
    section.expect("pos_enc_layer_type", "rel_pos_espnet")
    section.expect("selfattention_layer_type", "rel_selfattn")
    section.expect("activation_type", "swish")
    section.expect("use_dynamic_chunk", False)
    section.expect("use_dynamic_left_chunk", False)
    section.expect("static_chunk_size", 0)
    section.expect("use_cnn_module", False)
    section.expect("macaron_style", False)
    section.expect("key_bias", True)
    section.expect("global_cmvn", None)
    encoder = section.fill(EncoderConfig)
    if encoder.output_size % 2 or encoder.output_size % encoder.attention_heads:
        section.refuse(
            "output_size", encoder.output_size, f"an even multiple of attention_heads ({encoder.attention_heads})"
        )
    section.finish(
        ignored=(
            *("dropout_rate", "positional_dropout_rate", "attention_dropout_rate", "gradient_checkpointing"),
            *("positionwise_conv_kernel_size", "cnn_module_kernel", "cnn_module_norm", "causal"),
        )
    )
    return encoder


def _regulator(section: Section, size: int) -> int:
    section.expect("channels", size)
    section.expect("out_channels", None, size)
    section.expect("groups", 1)
    ratios = section.value("sampling_ratios", (1,) * FlowConfig.regulator_layers)
    if set(ratios) != {1}:
        section.refuse("sampling_ratios", list(ratios), "a list of ones")
    section.finish()
    return len(ratios)


def _solver(params: Section) -> dict[str, float]:
    if "content" in params:
        params = params.section("content")
    params.expect("solver", "euler")
    params.expect("t_scheduler", "cosine")
    names = ("inference_cfg_rate", "training_cfg_rate", "sigma_min")
    values = {name: params.value(name, getattr(FlowConfig, name)) for name in names}
    params.finish(ignored=("reg_loss_type",))
    return values


def _estimator(section: Section, size: int) -> EstimatorConfig:
    estimator = section.fill(EstimatorConfig)
    section.expect("in_channels", 4 * size)
    section.expect("out_channels", size)
    section.expect("act_fn", "gelu")
    if len(estimator.channels) != 2 or any(width % 8 for width in estimator.channels):
        section.refuse("channels", list(estimator.channels), "two widths, each a multiple of 8")
    section.finish(ignored=("dropout",))
    return estimator


def _hift(section: Section, mel: MelConfig) -> HiFTConfig:
    istft = section.section("istft_params")
    predictor = section.section("f0_predictor", "ConvRNNF0Predictor")
    hift = section.fill(
        HiFTConfig,
        istft_n_fft=istft.value("n_fft", HiFTConfig.istft_n_fft),
        istft_hop_len=istft.value("hop_len", HiFTConfig.istft_hop_len),
        f0_cond_channels=predictor.value("cond_channels", HiFTConfig.f0_cond_channels),
    )
    section.expect("in_channels", mel.num_mels)
    section.expect("sampling_rate", mel.sampling_rate)
    predictor.expect("num_class", 1)
    predictor.expect("in_channels", hift.in_channels)
    _check_upsampling(section, hift, mel)
    _check_resblocks(section, hift)
    istft.finish()
    predictor.finish()
    section.finish()
    return hift


def _check_upsampling(section: Section, hift: HiFTConfig, mel: MelConfig) -> None:
    rates, kernels = hift.upsample_rates, hift.upsample_kernel_sizes
    if len(kernels) != len(rates) or any(kernel < rate or (kernel - rate) % 2 for rate, kernel in zip(rates, kernels)):
        section.refuse("upsample_kernel_sizes", list(kernels), f"one per rate {list(rates)}, longer by an even number")
    if math.prod(rates) * hift.istft_hop_len != mel.hop_size:
        section.refuse(
            "upsample_rates", list(rates), f"product times hop_len equal to the mel's hop_size ({mel.hop_size})"
        )
    if hift.base_channels % 2 ** len(rates):
        section.refuse("base_channels", hift.base_channels, f"a multiple of {2 ** len(rates)}")
    if hift.istft_n_fft % 2 or hift.istft_hop_len > hift.istft_n_fft:
        section.refuse("istft_params", {"n_fft": hift.istft_n_fft}, "an even n_fft not below hop_len")


def _check_resblocks(section: Section, hift: HiFTConfig) -> None:
    for prefix, count in (("resblock", None), ("source_resblock", len(hift.upsample_rates))):
        kernels = getattr(hift, f"{prefix}_kernel_sizes")
        dilations = getattr(hift, f"{prefix}_dilation_sizes")
        if len(dilations) != len(kernels) or any(kernel % 2 == 0 for kernel in kernels):
            section.refuse(f"{prefix}_kernel_sizes", list(kernels), "odd sizes, one per entry of the dilation sizes")
        if count is not None and len(kernels) != count:
            section.refuse(f"{prefix}_kernel_sizes", list(kernels), f"{count} sizes, one per upsampling")
