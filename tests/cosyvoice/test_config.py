import random
from pathlib import Path

import numpy as np
import pytest
import torch

from cosyvoice.config import CosyVoiceConfig, FlowConfig, HiFTConfig, MelConfig, read_config
from tokenizer.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"
FULL = (GOLDEN / "manifests" / "cosyvoice_full.yaml").read_text()


def write(folder, text):
    (folder / "cosyvoice.yaml").write_text(text)
    return folder


def test_release_file_gives_the_defaults():
    assert read_config(GOLDEN / "manifests" / "cosyvoice_full.yaml") == CosyVoiceConfig()


def test_missing_keys_take_the_release_values(tmp_path):
    text = "flow: !new:cosyvoice.flow.flow.MaskedDiffWithXvec\nhift: {}\nfeat_extractor: {fmax: 7600}\n"
    config = read_config(write(tmp_path, text))
    assert (config.flow, config.hift) == (FlowConfig(), HiFTConfig())
    assert config.mel == MelConfig(fmax=7600.0)
    assert config.sample_rate == 22050


def test_numbers_come_from_the_file():
    config = read_config(GOLDEN / "flow")
    assert config.flow.encoder.output_size == 64
    assert config.flow.estimator.channels == (48, 48)
    assert config.flow.sigma_min == 1e-6
    assert config.flow.spk_embed_dim == 192
    assert config.hift.resblock_dilation_sizes == ((1, 3, 5),) * 3
    assert config.hift.f0_cond_channels == 48


@pytest.mark.parametrize(
    "place",
    [
        "boom: !apply:os.system ['touch {mark}']\n",
        "boom: !new:subprocess.Popen {{args: [touch, '{mark}']}}\n",
        "boom: [{{deep: !apply:pathlib.Path.touch [!new:pathlib.Path ['{mark}']]}}]\n",
    ],
)
def test_nothing_in_the_file_runs(tmp_path, place):
    mark = tmp_path / "ran"
    assert read_config(write(tmp_path, FULL + place.format(mark=mark))) == CosyVoiceConfig()
    assert not mark.exists()


def test_no_random_generator_is_touched():
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    read_config(GOLDEN / "flow")
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_called_value_is_refused_and_not_run(tmp_path):
    mark = tmp_path / "ran"
    text = FULL.replace("base_channels: 512", f"base_channels: !apply:os.system ['touch {mark}']")
    with pytest.raises(CheckpointError, match=r"hift\.base_channels is !apply:os\.system"):
        read_config(write(tmp_path, text))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("use_cnn_module: False", "use_cnn_module: True", r"flow\.encoder\.use_cnn_module is True; supported: False"),
        ("macaron_style: False", "macaron_style: True", r"macaron_style is True"),
        ("macaron_style: False", "use_dynamic_chunk: True", r"use_dynamic_chunk is True; supported: False"),
        ("macaron_style: False", "static_chunk_size: 25", r"static_chunk_size is 25"),
        ("input_layer: 'linear'", "input_layer: 'conv2d'", r"input_layer is 'conv2d'; supported: 'linear'"),
        ("rel_pos_espnet", "abs_pos", r"pos_enc_layer_type is 'abs_pos'"),
        ("rel_selfattn", "selfattn", r"selfattention_layer_type is 'selfattn'"),
        ("normalize_before: True", "normalize_before: 1", r"normalize_before is 1; supported: True"),
        ("sampling_ratios: [1, 1, 1, 1]", "sampling_ratios: [1, 2]", r"sampling_ratios is \[1, 2\]"),
        ("solver: 'euler'", "solver: 'midpoint'", r"cfm_params\.content\.solver is 'midpoint'; supported: 'euler'"),
        ("t_scheduler: 'cosine'", "t_scheduler: 'linear'", r"t_scheduler is 'linear'"),
        ("act_fn: 'gelu'", "act_fn: 'snakebeta'", r"estimator\.act_fn is 'snakebeta'; supported: 'gelu'"),
        ("channels: [256, 256]", "channels: [256]", r"estimator\.channels is \[256\]; supported: two widths"),
        ("channels: [256, 256]", "channels: [256, 100]", r"multiple of 8"),
        ("in_channels: 320", "in_channels: 240", r"estimator\.in_channels is 240; supported: 320"),
        ("ConditionalDecoder", "CausalConditionalDecoder", r"estimator is !new:cosyvoice\.flow\.decoder\.Causal"),
        ("upsample_rates: [8, 8]", "upsample_rates: [8, 5, 3]", r"upsample_kernel_sizes is \[16, 16\]"),
        ("upsample_rates: [8, 8]", "upsample_rates: [8, 4]", r"upsample_rates is \[8, 4\].*hop_size \(256\)"),
        ("source_resblock_kernel_sizes: [7, 11]", "source_resblock_kernel_sizes: [7, 8]", r"odd sizes"),
        ("num_class: 1", "num_class: 2", r"f0_predictor\.num_class is 2"),
        ("center: False", "center: True", r"feat_extractor\.center is True"),
        ("fmax: 8000", "fmax: 12000", r"fmax is 12000\.0"),
        ("num_blocks: 6", "num_blocks: 0", r"num_blocks is 0; supported: a whole number"),
        ("num_blocks: 6", "num_blocks: six", r"num_blocks is 'six'"),
        ("audio_limit: 0.99", "audio_limit: .nan", r"audio_limit is nan"),
        ("attention_heads: 8", "attention_heads: 7", r"multiple of attention_heads \(7\)"),
        ("num_blocks: 6", "num_blocks: 6\n        conv_kernel: 31", r"unknown key 'flow\.encoder\.conv_kernel' = 31"),
        ("lrelu_slope: 0.1", "slope: 0.1", r"unknown key 'hift\.slope'"),
        ("flow: !new", "flaw: !new", r"the key 'flow' is missing"),
        ("feat_extractor: !name", "feats: !name", r"the key 'feat_extractor' is missing"),
        ("spk_embed_dim: !ref <spk_embed_dim>", "spk_embed_dim: !ref <nowhere>", r"!ref <nowhere>; supported: a ref"),
        ("spk_embed_dim: !ref <spk_embed_dim>", "spk_embed_dim: !ref <sample_rate> * 2", r"without arithmetic"),
        ("spk_embed_dim: 192", "spk_embed_dim: !ref <spk_embed_dim>", r"circle"),
        ("spk_embed_dim: 192", "spk_embed_dim: !include:other.yaml", r"line 8: .*'!include:other\.yaml'"),
        ("spk_embed_dim: 192", "spk_embed_dim: !!python/object/apply:os.getpid []", r"python/object/apply:os\.getpid"),
        ("hift: !new:cosyvoice.hifigan.generator.HiFTGenerator", "hift: 3\nrest:", r"hift is 3; supported: a mapping"),
    ],
)
def test_what_is_not_built_here_is_refused_by_name(tmp_path, old, new, message):
    assert old in FULL
    with pytest.raises(CheckpointError, match=message) as error:
        read_config(write(tmp_path, FULL.replace(old, new, 1)))
    assert str(error.value).startswith(str(tmp_path / "cosyvoice.yaml"))
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"- 1\n", "holds no mapping"),
        (b"flow: [", "line"),
        (b"\xff\xfe\x00bad", "cosyvoice.yaml: "),
        (b"a: &a !new:x {b: *a}\n", "recursive"),
        (b"[" * 5000, "cannot be read as yaml|holds no mapping|line"),
        (b"? [1, 2]\n: 3\n? {a: b}\n: 4\n", "line"),
    ],
)
def test_broken_files(tmp_path, content, message):
    (tmp_path / "cosyvoice.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"cosyvoice\.yaml is missing"):
        read_config(tmp_path)


def test_references_reach_into_tagged_mappings(tmp_path):
    text = FULL.replace(
        "input_size: 512\n    output_size", "input_size: !ref <flow[encoder][input_size]>\n    output_size"
    )
    text = text.replace("fmax: 8000", "fmax: null")
    config = read_config(write(tmp_path, text))
    assert config.flow == FlowConfig()
    assert config.mel.fmax == 11025.0


def test_messages_stay_short_for_aliases_of_aliases(tmp_path):
    levels = ["l0: &l0 [1, 1]\n"] + [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 12)]
    text = "".join(levels) + FULL.replace("base_channels: 512", "base_channels: !ref <l11>")
    with pytest.raises(CheckpointError, match=r"hift\.base_channels is \[\[") as error:
        read_config(write(tmp_path, text))
    assert len(str(error.value)) < 2_000
