"""Step-1 as a transformers model: every kind of folder, masks, caches, placement, tensor parallelism, training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

from stepaudio.golden.step1_lm import replay_alibi, replay_model
from stepaudio.lm import modeling
from stepaudio.lm.attention import sqrt_alibi_attention
from stepaudio.lm.load import load_model
from stepaudio.lm.modeling import Step1Config, Step1ForCausalLM, attention_name, key_mask
from tokenizer.errors import CheckpointError, RequestError

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(golden: Path) -> Path:
    return golden / "step1_lm" / "A"


@pytest.fixture(scope="module")
def model(folder: Path) -> Step1ForCausalLM:
    return load_model(folder)


@pytest.fixture(scope="module")
def prompt(folder: Path) -> Tensor:
    return load_file(folder / "golden.safetensors")["input_ids"][None]


def small(**changes: object) -> Step1ForCausalLM:
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 6}
    sizes |= {"num_attention_groups": 2, "num_hidden_layers": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    return Step1ForCausalLM(Step1Config(**sizes | changes)).eval()


def copy_of(folder: Path, to: Path, **config: object) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("golden*"))
    values = json.loads((folder / "config.json").read_text(encoding="utf-8")) | config
    (to / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return to


def in_shards(folder: Path, to: Path, index: bool) -> Path:
    """The release's form: shards named model-00001.safetensors, with or without the index."""
    copy_of(folder, to)
    weights = load_file(folder / "model.safetensors")
    (to / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + n % 3}.safetensors" for n, name in enumerate(names)}
    for shard in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == shard}, to / shard, {"format": "pt"})
    if index:
        (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return to


@pytest.mark.parametrize("name", ["A", "C"])
def test_golden_values(name: str, golden: Path) -> None:
    failed = [row for row in replay_model(golden / "step1_lm" / name) if not row.ok]
    assert not failed


def test_golden_bias_tables(golden: Path) -> None:
    rows = list(replay_alibi(golden / "step1_lm" / "alibi.safetensors"))
    assert rows and all(row.ok for row in rows)


# Loading


@pytest.mark.parametrize("form", ["one file", "index", "bare shards"])
def test_every_form_of_folder_loads_alike(
    form: str, folder: Path, model: Step1ForCausalLM, prompt: Tensor, tmp_path: Path
) -> None:
    source = folder if form == "one file" else in_shards(folder, tmp_path / "copy", form == "index")
    with torch.inference_mode():
        expected = model(prompt).logits
        for loaded in (load_model(source), Step1ForCausalLM.from_pretrained(source, dtype=torch.float32)):
            assert torch.equal(loaded(prompt).logits, expected)


def test_auto_classes_take_it_without_remote_code(folder: Path, tmp_path: Path) -> None:
    assert "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    bare = in_shards(folder, tmp_path / "copy", index=False)
    for source in (folder, bare):
        loaded = AutoModelForCausalLM.from_pretrained(source)
        assert type(loaded) is Step1ForCausalLM and loaded.dtype == torch.bfloat16
        assert loaded.config.name_or_path == str(source) and not loaded.training
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is Step1Config and not hasattr(config, "auto_map")
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (2, 64, 32768)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 3, 0)


@pytest.mark.parametrize("tie", [True, None])
def test_lm_head_is_never_tied(tie: bool | None, folder: Path, model: Step1ForCausalLM, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("tie_word_embeddings")
    copy = copy_of(folder, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(config | ({} if tie is None else {"tie_word_embeddings": tie})))
    for loaded in (load_model(copy), AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)):
        assert loaded.config.tie_word_embeddings is False
        assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
        loaded.tie_weights()
        assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_saved_folder_has_the_releases_keys(folder: Path, model: Step1ForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    saved, released = load_file(tmp_path / "model.safetensors"), load_file(folder / "model.safetensors")
    assert saved.keys() == released.keys()
    assert all(torch.equal(saved[name], released[name].float()) for name in saved)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "step1" and config["num_attention_groups"] == 2 and config["max_seq_len"] == 32768
    assert "num_key_value_heads" not in config and "auto_map" not in config
    assert torch.equal(load_model(tmp_path).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    "harm, message",
    [
        ("cut", "bytes, its header promises"),
        ("cut to header", "truncated or not safetensors"),
        ("empty", "is empty"),
        ("pointer", "git-lfs pointer"),
        ("gone", "1 of 3 weight files are missing, first model-00002.safetensors"),
        ("index", "is no weight index"),
        ("renamed", "the weights lack 1 tensors of the model in config.json, first lm_head.weight"),
        ("shape", "has shape .*, config.json asks for"),
        ("nothing", "holds no .*safetensors"),
        ("twice", "lies in .* and in"),
    ],
)
def test_broken_weights_are_told_before_loading(harm: str, message: str, folder: Path, tmp_path: Path) -> None:
    copy = in_shards(folder, tmp_path / "copy", index=harm not in ("twice", "nothing"))
    shard, index = copy / "model-00002.safetensors", copy / "model.safetensors.index.json"
    data = shard.read_bytes()
    if harm == "cut":
        shard.write_bytes(data[:-100])
    elif harm == "cut to header":
        shard.write_bytes(data[:40])
    elif harm == "empty":
        shard.write_bytes(b"")
    elif harm == "pointer":
        shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    elif harm == "gone":
        shard.unlink()
    elif harm == "index":
        index.write_text("{}")
    elif harm == "renamed":
        index.write_text(index.read_text().replace("lm_head.weight", "head.weight"))
        tensors = load_file(copy / "model-00001.safetensors")
        renamed = {name.replace("lm_head", "head"): tensor for name, tensor in tensors.items()}
        save_file(renamed, copy / "model-00001.safetensors")
    elif harm == "shape":
        copy_config = json.loads((copy / "config.json").read_text()) | {"intermediate_size": 321}
        (copy / "config.json").write_text(json.dumps(copy_config))
    elif harm == "nothing":
        for path in copy.glob("*.safetensors"):
            path.unlink()
    elif harm == "twice":
        shutil.copy(shard, copy / "old.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(copy)


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"num_attention_groups": 4}, CheckpointError),
        ({"hidden_size": 25}, CheckpointError),
        ({"num_hidden_layers": 0}, CheckpointError),
        ({"alibi_dtype": "fp8"}, RequestError),
        ({"attn_implementation": "eager"}, RequestError),
        ({"attn_implementation": "sdpa"}, RequestError),
    ],
)
def test_configs_that_cannot_work_are_refused(changes: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        small(**changes)


def test_attention_that_ignores_the_bias_is_refused_at_any_time(folder: Path, model: Step1ForCausalLM) -> None:
    with pytest.raises(RequestError, match="choose one of sqrt_alibi"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    with pytest.raises(RequestError, match="gives noise"):
        model.set_attn_implementation("eager")


def test_another_implementation_plugs_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(module: nn.Module, query: Tensor, *args: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        calls.append((module.layer_idx, tuple(query.shape), kwargs["slopes"].shape, kwargs["query_start"]))
        return sqrt_alibi_attention(module, query, *args, **kwargs)

    monkeypatch.setattr(modeling, "_attentions", dict(modeling._attentions))
    modeling.register_attention("counted", counted)
    other = Step1ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="counted")
    other(torch.ones(1, 7, dtype=torch.long))
    assert calls == [(layer, (1, 4, 7, 64), (4,), 0) for layer in range(3)]


# Masks and caches


def test_left_padded_batch_of_8_equals_8_single_runs(model: Step1ForCausalLM) -> None:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, 1024, (length,), generator=generator) for length in (1, 5, 9, 17, 20, 33, 40, 41)]
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).long()
    batch = model.generate(ids, attention_mask=mask, **options)
    for row, p in enumerate(prompts):
        single = model.generate(p[None], **options)
        assert batch.sequences[row, width:].tolist() == single.sequences[0, len(p) :].tolist()
        for joined, alone in zip(batch.logits, single.logits):
            assert (joined[row] - alone[0]).abs().max() < 2e-5


def test_right_padding_and_unmasked_rows_do_not_disturb(model: Step1ForCausalLM, prompt: Tensor) -> None:
    with torch.inference_mode():
        expected = model(prompt[:, :20]).logits
        mask = (torch.arange(32) < 20).long()[None]
        found = model(prompt[:, :32], attention_mask=mask).logits[:, :20]
        assert (found - expected).abs().max() < 1e-5
        assert model(prompt[:, :8], attention_mask=torch.zeros(1, 8, dtype=torch.long)).logits.isfinite().all()


def test_static_cache_equals_a_growing_one(model: Step1ForCausalLM, prompt: Tensor) -> None:
    ids, mask = prompt[:, :12].repeat(2, 1), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    with torch.inference_mode():
        cache = StaticCache(config=model.config, max_cache_len=40)
        pieces = [model(piece, past_key_values=cache).logits for piece in prompt[:, :30].split(11, dim=1)]
        assert (torch.cat(pieces, dim=1) - model(prompt[:, :30]).logits).abs().max() < 2e-5


def test_packed_sequences_do_not_see_each_other(model: Step1ForCausalLM, prompt: Tensor) -> None:
    with torch.inference_mode():
        first, second = model(prompt[:, :9]).logits, model(prompt[:, 9:20]).logits
        positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
        packed = model(prompt[:, :20], position_ids=positions, use_cache=False).logits
        assert (packed - torch.cat([first, second], dim=1)).abs().max() < 1e-5


def test_a_mask_without_the_cached_tokens_is_refused(model: Step1ForCausalLM, prompt: Tensor) -> None:
    cache = DynamicCache(config=model.config)
    model(prompt[:, :6], past_key_values=cache)
    with pytest.raises(RequestError, match="covers 3 tokens, but 6 cached and 3 new"):
        model(prompt[:, 6:9], past_key_values=cache, attention_mask=torch.ones(1, 3))


def test_logits_to_keep_and_embeddings_in(model: Step1ForCausalLM, prompt: Tensor) -> None:
    with torch.inference_mode():
        whole = model(prompt).logits
        for kept, expected in ((3, whole[:, -3:]), (torch.tensor([4, 7]), whole[:, [4, 7]])):
            assert torch.allclose(model(prompt, logits_to_keep=kept).logits, expected, atol=1e-5)
        assert torch.equal(model(inputs_embeds=model.model.embed_tokens(prompt)).logits, whole)
        with pytest.raises(RequestError, match="either"):
            model()


def test_key_mask_is_never_square_for_plain_attention() -> None:
    mask = torch.tensor([[0, 1, 1]], dtype=torch.bool)
    assert key_mask(1, 3, 3) is None
    assert key_mask(1, 3, 3, attention_mask=mask).tolist() == mask.tolist()
    assert key_mask(1, 3, 5, attention_mask=mask).tolist() == [[False, True, True, False, False]]
    with pytest.raises(RequestError, match="covers 3 tokens, but 4 cached and 3 new"):
        key_mask(1, 3, 7, q_offset=4, attention_mask=mask)


def test_names_of_implementations() -> None:
    assert attention_name(None) == attention_name("sqrt_alibi") == "sqrt_alibi"
    with pytest.raises(RequestError, match="'sdpa' has no square-root ALiBi bias"):
        attention_name("sdpa")


# Placement


def test_host_and_disk_offload_equal_whole(
    folder: Path, model: Step1ForCausalLM, prompt: Tensor, tmp_path: Path
) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    places |= {"model.norm": "cpu", "lm_head": "disk"}
    for source in (folder, in_shards(folder, tmp_path / "bare", index=False)):
        spread = load_model(source, device_map=places, offload_folder=str(tmp_path / "offload"))
        assert spread.model.layers[1].mlp.up_proj.weight.is_meta
        with torch.inference_mode():
            assert torch.equal(spread(prompt).logits, model(prompt).logits)
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    assert torch.equal(spread.generate(prompt, **options), model.generate(prompt, **options))


def test_auto_map_never_splits_a_layer(folder: Path, model: Step1ForCausalLM, prompt: Tensor, tmp_path: Path) -> None:
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    limit = model.model.embed_tokens.weight.numel() * 4 + 2 * layer + 1000
    spread = load_model(folder, device_map="auto", max_memory={"cpu": limit}, offload_folder=str(tmp_path))
    assert set(spread.hf_device_map.values()) == {"cpu", "disk"}
    assert not any(".layers." in name and name.count(".") > 2 for name in spread.hf_device_map)
    with torch.inference_mode():
        assert torch.equal(spread(prompt).logits, model(prompt).logits)


def test_projections_are_plain_linears_under_the_usual_names(model: Step1ForCausalLM) -> None:
    linears = {name.rpartition(".")[2] for name, module in model.named_modules() if type(module) is nn.Linear}
    assert linears == {*(f"{k}_proj" for k in ("q", "k", "v", "o", "gate", "up", "down")), "lm_head"}
    assert not list(model.buffers())


_PARALLEL = """
import sys, torch
from transformers.distributed import DistributedConfig
from stepaudio.lm.modeling import Step1ForCausalLM
torch.set_num_threads(1)
folder, work, rank = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{work}/meet", rank=int(rank), world_size=2)
options = {"dtype": torch.float32, "distributed_config": DistributedConfig(tp_size=2)}
split = Step1ForCausalLM.from_pretrained(folder, **options)
assert split.model.layers[0].self_attn.q_proj.weight.to_local().shape == (128, 256)
with torch.inference_mode():
    logits = split(torch.arange(4, 28)[None]).logits
torch.save(logits, f"{work}/logits{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the two ranks meet over the loopback device lo")
def test_tensor_parallel_equals_whole(folder: Path, model: Step1ForCausalLM, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", _PARALLEL, str(folder), str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(r)], env=environment, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)[-3000:]
    with torch.inference_mode():
        expected = model(torch.arange(4, 28)[None]).logits
    for rank in (0, 1):
        assert (torch.load(tmp_path / f"logits{rank}.pt", weights_only=True) - expected).abs().max() < 2e-5
