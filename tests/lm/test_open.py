"""Which engine is chosen, why, and what is refused."""

import json
import logging

import pytest
import torch

from stepaudio.lm.base import SamplingParams
from stepaudio.lm.fast import FastLM
from stepaudio.lm.local import LocalLM
from stepaudio.lm.open import choose, open_lm
from tokenizer.errors import CheckpointError, RequestError

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
NO_KERNEL = "kernels need compute capability 8.0, this GPU has 7.5"
PACKED = {"quantization_config": {"load_in_8bit": True}}


@pytest.fixture
def gpu(monkeypatch):
    """Puts a made-up GPU in place: `gpu(None)` one with every kernel, `gpu(reason)` one without, and why."""

    def use(reason, precisions=()):
        def against(device, precision="bfloat16"):
            return reason if device.type == "cuda" and (not precisions or precision in precisions) else None

        monkeypatch.setattr("stepaudio.lm.open.reason_against", against)

    use(None)
    return use


@pytest.mark.parametrize(
    ("device", "engine", "precision", "config", "expected", "why"),
    [
        (CPU, "auto", "auto", {}, "fast", None),
        (CPU, "fast", "int8", {}, "fast", None),
        (CPU, "eager", "auto", {}, "eager", None),
        (CUDA, "auto", "auto", {}, "fast", None),
        (CUDA, "auto", "fp8", {}, "fast", None),
        (CUDA, "eager", "auto", {"device_map": "auto"}, "eager", None),
        (MPS, "auto", "auto", {}, "eager", "mps has neither kernels"),
        (CUDA, "auto", "auto", {"device_map": "auto"}, "eager", "spread over devices"),
        (CUDA, "auto", "auto", {"max_memory": {0: "1GiB"}}, "eager", "spread over devices"),
        (CUDA, "auto", "auto", PACKED, "eager", "packed by another library"),
        (CPU, "auto", "auto", {"alibi_dtype": "bfloat16"}, "eager", "rounds the position bias"),
        (CPU, "auto", "auto", {"alibi_dtype": "float32"}, "fast", None),
        (CPU, "auto", "auto", {"attn_implementation": "own"}, "eager", "attn_implementation is an option"),
    ],
)
def test_choices(gpu, device, engine, precision, config, expected, why):
    chosen, reason = choose(device, engine, precision, config)
    assert chosen == expected and (reason is None) == (why is None) and (why or "") in (reason or "")


def test_old_gpus_take_the_plain_path(gpu):
    gpu(NO_KERNEL)
    assert choose(CUDA, "auto", "auto", {}) == ("eager", NO_KERNEL)


@pytest.mark.parametrize(
    ("device", "engine", "precision", "config", "message"),
    [
        (CPU, "quick", "auto", {}, "--engine 'quick' is unknown: use auto, fast, eager"),
        (CPU, "auto", "int3", {}, "--precision 'int3' is unknown: use auto, bfloat16, int8, fp8, int4"),
        (CPU, "eager", "int8", {}, "--precision int8 needs the fast engine"),
        (MPS, "fast", "auto", {}, "--engine fast is not possible: mps has"),
        (CUDA, "auto", "int4", {"device_map": "auto"}, "--precision int4 is not possible: the layers are spread"),
    ],
)
def test_refusals(gpu, device, engine, precision, config, message):
    with pytest.raises(RequestError) as caught:
        choose(device, engine, precision, config)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_gpu_without_a_precision_s_kernel(gpu):
    gpu("fp8 kernels need compute capability 8.9, this GPU has 8.0", precisions=("fp8",))
    assert choose(CUDA, "auto", "int8", {}) == ("fast", None)
    with pytest.raises(RequestError, match="--precision fp8 cannot run here: fp8 kernels need compute"):
        choose(CUDA, "auto", "fp8", {})


def test_a_folder_opens_as_what_was_chosen(golden, caplog, tmp_path):
    folder = golden / "step1_lm" / "A"
    with caplog.at_level(logging.WARNING):
        fast, eager = open_lm(folder, dtype=torch.float32), open_lm(folder, dtype=torch.float32, engine="eager")
        assert not caplog.records
        rounded = open_lm(folder, alibi_dtype="bfloat16", device_map=None)
    assert isinstance(fast, FastLM) and isinstance(eager, LocalLM) and isinstance(rounded, LocalLM)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["language model: plain path"]
    params = SamplingParams(temperature=0, max_new_tokens=20, stop_ids=())
    assert fast.generate([[1, 2, 3]], [params]) == eager.generate([[1, 2, 3]], [params])
    with pytest.raises(CheckpointError, match="missing"):
        open_lm(tmp_path)


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_precisions_run_on_the_cpu(golden, precision):
    lm = open_lm(golden / "step1_lm" / "A", dtype=torch.float32, precision=precision)
    plain = open_lm(golden / "step1_lm" / "A", dtype=torch.float32)
    assert lm.model.bytes_per_token < plain.model.bytes_per_token * (0.6 if precision == "bfloat16" else 0.4)
    [done] = lm.generate([[1, 2, 3]], [SamplingParams(seed=0, max_new_tokens=8, stop_ids=())])
    assert len(done.ids) == 8


def test_bench_measures_eager_and_fast(tiny, capsys, tmp_path):
    from stepaudio.cli import main

    out = tmp_path / "lm.json"
    options = ["--context", "128", "--batch", "1,2", "--device", "cpu", "--model-path", str(tiny), "--output", str(out)]
    assert main(["bench", "lm", *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == [
        "memory copy",
        "lm eager, batch 1, context 128",
        "lm float32, batch 1, context 128",
        "lm float32, batch 2, context 128",
        rows[-1]["name"],
    ]
    assert rows == json.loads(out.read_text())["rows"] and "prefill" in rows[-1]["name"]
    assert all(row["median"] > 0 and "skipped" not in row for row in rows)
    for bad in (["--precision", "int3"], ["--batch", "65"], ["--context", "1e3"], ["--context", "1000000"]):
        with pytest.raises(RequestError):
            main(["bench", "lm", *options, *bad])
