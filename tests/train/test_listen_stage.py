import json

import numpy as np
import pytest
import torch

from stepaudio.train.listen import LinguisticStage, ListenConfig, SemanticStage
from stepaudio.train.loop import LoopConfig, fit
from tokenizer.linguistic import LinguisticTokenizer
from tokenizer.semantic import SemanticTokenizer

CPU = torch.device("cpu")
SMALL = {
    LinguisticStage: ("rows", {"size": 32, "heads": 2, "feed_forward": 64, "layers": 2, "dropout": 0.0}),
    SemanticStage: ("log_mel", {"width": 32, "num_heads": 2, "num_layers": 1, "mlp_width": 64, "num_positions": 1500}),
}


@pytest.mark.parametrize("kind", SMALL)
def test_learns_to_write_down_eight_clips_and_exports(kind, tones, logged, tmp_path):
    features, model = SMALL[kind]
    folder, out = tones(features), tmp_path / "out"
    lines = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    rows = [{**line, "text": "abcd"[i % 4] + "dcba"[i % 4] + "bd"[i % 2]} for i, line in enumerate(lines)]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    loop = LoopConfig(steps=200, rate=5e-3, clip=5.0)
    rebuilt = 0.5 if kind is SemanticStage else 0.0
    config = ListenConfig(loop, model, quantise_from=0.9, seconds_per_batch=6.0, hidden_masks=0, reconstruction=rebuilt)
    stage = kind(config, folder, CPU)
    assert fit(stage, loop, out, CPU) == 200
    ctc = logged(out, "ctc")
    assert min(ctc) < 0.4 * ctc[0]
    exported = out / "Step-Audio-Tokenizer"
    sound = [np.random.default_rng(0).uniform(-0.1, 0.1, 24_000).astype(np.float32)]
    if kind is LinguisticStage:
        [codes] = LinguisticTokenizer.from_dir(exported).encode(sound)
        assert len(codes) == 25 and codes.max() < 1024
    else:
        [codes] = SemanticTokenizer.from_file(exported / "speech_tokenizer_v1.onnx").encode(sound)
        assert len(codes) == 38 and codes.max() < config.codes


@pytest.mark.gpu
@pytest.mark.parametrize("kind", SMALL)
def test_captured_encoders_learn_as_plain_ones(kind, tones, logged, tmp_path):
    features, model = SMALL[kind]
    folder = tones(features)
    ends = {}
    for graphs in (True, False):
        loop = LoopConfig(steps=60, rate=3e-3, clip=5.0)
        config = ListenConfig(loop, model, quantise_from=0.5, seconds_per_batch=6.0, hidden_masks=0, graphs=graphs)
        torch.manual_seed(0)
        stage = kind(config, folder, torch.device("cuda"))
        assert fit(stage, loop, tmp_path / str(graphs), torch.device("cuda")) == 60
        ends[graphs] = logged(tmp_path / str(graphs), "ctc")
    print(kind.__name__, "largest difference", max(abs(a - b) for a, b in zip(ends[True], ends[False])))
    assert ends[True][0] == pytest.approx(ends[False][0], rel=0.02)
    assert min(ends[True]) < 0.8 * ends[True][0]
    assert np.mean(ends[True][-10:]) == pytest.approx(np.mean(ends[False][-10:]), rel=0.25)
