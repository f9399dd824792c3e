import pytest
import torch

from phase1.config import EngineShape
from phase1.layers import attention
from phase1.measure.throughput import decode
from phase1.measure.throughput.decode import measure_decoding
from phase1.roster import model_config

SHAPE = EngineShape(
    vocab_size=300, d_model=32, n_layers=1, n_heads=2, ar_ssm_max_rank=8, ar_ssm_min_rank=2, ar_ssm_window=8, copy_window=16, htt_rank=2,
    htt_dense_rows=4, htt_groups=10,
)  # fmt: skip
MODELS = {role: model_config(role, SHAPE) for role in ("baseline", "baseline_optimized", "phase1")}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_engine_and_transformer_are_measured_after_every_context():
    found = measure_decoding(MODELS, (64, 16, 128), 1, 6, False, DEVICE)
    assert list(found) == ["baseline", "phase1"]
    for decoding in found.values():
        assert [point.context for point in decoding.points] == [16, 64, 128]
        for point in decoding.points:
            low, high = point.decode_tokens_per_second_ci95
            assert (
                len(point.step_times_ms) == 6
                and low <= point.decode_tokens_per_second <= high
                and point.prefill_tokens_per_second > 0
            )
    sizes = {role: [point.state_bytes for point in decoding.points] for role, decoding in found.items()}
    assert sizes["phase1"][0] == sizes["phase1"][2] and sizes["baseline"][2] == 8 * sizes["baseline"][0]


def test_every_step_is_one_more_token_after_the_same_context(monkeypatch):
    seen = []
    advance = decode.Decoder.advance
    monkeypatch.setattr(
        decode.Decoder, "advance", lambda self, ids, state: (seen.append((ids.shape[1], state)), advance(self, ids, state))[1]
    )
    measure_decoding({"phase1": MODELS["phase1"]}, (16, 20), 0, 3, False, DEVICE)
    steps = [state[0].position for length, state in seen if length == 1]
    assert steps == [16, 20] * 4  # one that makes room for keys, then three rounds


@pytest.mark.parametrize("graphs", [False, True])
def test_no_measured_step_copies_the_keys_of_the_context(monkeypatch, graphs):
    made, steps = [], []
    monkeypatch.setattr(attention, "Store", lambda *args, make=attention.Store: (made.append(1), make(*args))[1])
    monkeypatch.setattr(decode, "captured", lambda step: ([step() for _ in range(4)], (step, None))[1])  # warm-up and capture
    contexts = decode._Contexts(MODELS["baseline"], (16, 40), graphs, DEVICE, lambda tokens: None)
    plain = decode._Contexts(MODELS["baseline"], (16, 40), False, DEVICE, lambda tokens: None)
    count = len(made)
    for _ in range(3):
        for context in (16, 40):
            steps.append(torch.equal(contexts.steps[context]()[0], plain.steps[context]()[0]))
    assert len(made) == count and all(steps)


def test_a_model_that_runs_out_of_memory_is_left_out(monkeypatch):
    make = decode.make_workload

    def workload(config, device):
        if config.mixer == "attention":
            raise MemoryError("out of memory")
        return make(config, device)

    monkeypatch.setattr(decode, "make_workload", workload)
    assert list(measure_decoding(MODELS, (16, 32), 0, 1, False, DEVICE)) == ["phase1"]


def test_another_error_is_not_hidden(monkeypatch):
    monkeypatch.setattr(decode, "make_workload", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        measure_decoding(MODELS, (16, 32), 0, 1, False, DEVICE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_are_measured_too():
    found = measure_decoding(MODELS, (16, 128), 1, 6, True, "cuda")
    assert all(len(point.step_times_ms) == 6 for decoding in found.values() for point in decoding.points)
