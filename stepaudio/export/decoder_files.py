"""Writes a decoder folder: `cosyvoice.yaml`, `flow.pt`, `hift.pt`, `campplus.onnx`, as the release lays it out.

Source: formats.md sections 1.2, 7.1, 7.2, 7.4, 7.7.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cosyvoice.campplus import CampPlus
from cosyvoice.config import CONFIG_NAME, CosyVoiceConfig
from cosyvoice.onnx_export import write_campplus_onnx
from cosyvoice.weight_norm import split_weight_norm
from tokenizer.files import atomic_write

FLOW_FILE, VOCODER_FILE, SPEAKER_FILE = "flow.pt", "hift.pt", "campplus.onnx"


def write_decoder(
    folder: Path,
    config: CosyVoiceConfig,
    flow: Mapping[str, Tensor],
    vocoder: Mapping[str, Tensor],
    speaker_encoder: CampPlus,
) -> None:
    """All four files. `flow` and `vocoder` are the modules' state dicts, the vocoder's with plain weights."""
    write_config(folder, config)
    write_tensors(folder / FLOW_FILE, flow)
    write_tensors(folder / VOCODER_FILE, split_weight_norm(vocoder))
    write_campplus_onnx(folder / SPEAKER_FILE, speaker_encoder)


def write_config(folder: Path, config: CosyVoiceConfig) -> None:
    """`cosyvoice.yaml`, which flow and vocoder share."""
    with atomic_write(folder / CONFIG_NAME) as temporary:
        temporary.write_text(yaml_text(config), encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A plain dict of CPU tensors as a PyTorch zip file; same tensors, same bytes."""
    plain = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(plain, file)  # given a path, torch would write its name into the file


def yaml_text(config: CosyVoiceConfig) -> str:
    """`cosyvoice.yaml` of these numbers, with the class names that the public tools expect."""
    return _TEMPLATE.format(flow=config.flow, hift=config.hift, mel=config.mel, lists=_Lists(config))


class _Lists:
    """The tuples of the configuration as yaml lists."""

    def __init__(self, config: CosyVoiceConfig) -> None:
        self.channels = _list(config.flow.estimator.channels)
        self.sampling_ratios = _list((1,) * config.flow.regulator_layers)
        for name in (
            *("upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes", "resblock_dilation_sizes"),
            *("source_resblock_kernel_sizes", "source_resblock_dilation_sizes"),
        ):
            setattr(self, name, _list(getattr(config.hift, name)))
        self.flow_channels = 3 * config.flow.output_size


def _list(values: tuple) -> str:
    return "[" + ", ".join(_list(value) if isinstance(value, tuple) else str(value) for value in values) + "]"


_TEMPLATE = """\
sample_rate: {mel.sampling_rate}
spk_embed_dim: {flow.spk_embed_dim}

flow: !new:cosyvoice.flow.flow.MaskedDiffWithXvec
    input_size: {flow.input_size}
    output_size: {flow.output_size}
    spk_embed_dim: !ref <spk_embed_dim>
    output_type: 'mel'
    vocab_size: {flow.vocab_size}
    input_frame_rate: {flow.input_frame_rate}
    only_mask_loss: True
    encoder: !new:cosyvoice.transformer.encoder.ConformerEncoder
        output_size: {flow.encoder.output_size}
        attention_heads: {flow.encoder.attention_heads}
        linear_units: {flow.encoder.linear_units}
        num_blocks: {flow.encoder.num_blocks}
        dropout_rate: 0.01
        positional_dropout_rate: 0.01
        attention_dropout_rate: 0.01
        normalize_before: True
        input_layer: 'linear'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'rel_selfattn'
        input_size: {flow.encoder.input_size}
        use_cnn_module: False
        macaron_style: False
    length_regulator: !new:cosyvoice.flow.length_regulator.InterpolateRegulator
        channels: {flow.output_size}
        sampling_ratios: {lists.sampling_ratios}
    decoder: !new:cosyvoice.flow.flow_matching.ConditionalCFM
        in_channels: {lists.flow_channels}
        n_spks: 1
        spk_emb_dim: {flow.output_size}
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: {flow.sigma_min!r}
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: {flow.training_cfg_rate}
                inference_cfg_rate: {flow.inference_cfg_rate}
                reg_loss_type: 'l1'
        estimator: !new:cosyvoice.flow.decoder.ConditionalDecoder
            in_channels: {flow.estimator.in_channels}
            out_channels: {flow.estimator.out_channels}
            channels: {lists.channels}
            dropout: 0.0
            attention_head_dim: {flow.estimator.attention_head_dim}
            n_blocks: {flow.estimator.n_blocks}
            num_mid_blocks: {flow.estimator.num_mid_blocks}
            num_heads: {flow.estimator.num_heads}
            act_fn: 'gelu'

hift: !new:cosyvoice.hifigan.generator.HiFTGenerator
    in_channels: {hift.in_channels}
    base_channels: {hift.base_channels}
    nb_harmonics: {hift.nb_harmonics}
    sampling_rate: !ref <sample_rate>
    nsf_alpha: {hift.nsf_alpha}
    nsf_sigma: {hift.nsf_sigma}
    nsf_voiced_threshold: {hift.nsf_voiced_threshold}
    upsample_rates: {lists.upsample_rates}
    upsample_kernel_sizes: {lists.upsample_kernel_sizes}
    istft_params:
        n_fft: {hift.istft_n_fft}
        hop_len: {hift.istft_hop_len}
    resblock_kernel_sizes: {lists.resblock_kernel_sizes}
    resblock_dilation_sizes: {lists.resblock_dilation_sizes}
    source_resblock_kernel_sizes: {lists.source_resblock_kernel_sizes}
    source_resblock_dilation_sizes: {lists.source_resblock_dilation_sizes}
    lrelu_slope: {hift.lrelu_slope}
    audio_limit: {hift.audio_limit}
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor
        num_class: 1
        in_channels: {hift.in_channels}
        cond_channels: {hift.f0_cond_channels}

feat_extractor: !name:cosyvoice.matcha.audio.mel_spectrogram
    n_fft: {mel.n_fft}
    num_mels: {mel.num_mels}
    sampling_rate: !ref <sample_rate>
    hop_size: {mel.hop_size}
    win_size: {mel.win_size}
    fmin: {mel.fmin}
    fmax: {mel.fmax}
    center: False
"""
