import gc
import tracemalloc
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from phase1.config import EngineShape, TrainConfig
from phase1.data.tokenizers import byte_alphabet, make_tokenizer
from phase1.generation import Decoder, load, replay, state_bytes
from phase1.generation.decoder import PIECE
from phase1.generation.replay import static
from phase1.model import LanguageModel
from phase1.roster import model_config
from phase1.training.checkpoint import save_checkpoint
from phase1.training.job import keep_tokenizer
from phase1.training.step import make_train_state

SHAPE = EngineShape(
    vocab_size=300,
    d_model=32,
    n_layers=2,
    n_heads=2,
    ar_ssm_max_rank=8,
    ar_ssm_min_rank=2,
    htt_rank=2,
    htt_dense_rows=4,
    htt_groups=10,
)  # windows of 64 and 2048
LENGTHS = [1, 3, 4, 63, 64, 65, PIECE - 1, PIECE + 1, 2047, 2048, 2049, 4099]
BYTES = make_tokenizer("bytes", {c: i for i, c in enumerate([*byte_alphabet(), "<|endoftext|>"])}, [])


def decoder(role="phase1", shape=SHAPE, dtype=torch.float32):
    torch.manual_seed(0)
    model = LanguageModel(model_config(role, shape)).to(dtype)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return Decoder(model, BYTES)


def whole(decoder, ids):
    """log p of the token after `ids`, by one pass over all of them."""
    with torch.no_grad():
        return decoder.model(torch.tensor([ids]))[0, -1].log_softmax(-1)


def text(length, seed=0):
    return torch.randint(0, 257, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("role", ["phase1", "baseline"])
@pytest.mark.parametrize("length", LENGTHS)
def test_pieces_and_steps_give_what_one_pass_gives(role, length):
    d = decoder(role)
    ids = text(length + 3)
    log_p, state = d.prefill(ids[:length])
    for end in range(length, length + 3):
        torch.testing.assert_close(log_p, whole(d, ids[:end]), atol=1e-5, rtol=1e-5)
        log_p, state = d.step(ids[end], state)


def test_a_text_of_one_token_at_a_time_gives_what_one_pass_gives():
    d = decoder(shape=replace(SHAPE, ar_ssm_window=8, copy_window=16), dtype=torch.float64)
    ids = text(40)
    log_p, state = d.prefill(ids[:1])
    for end in range(1, 40):
        torch.testing.assert_close(log_p, whole(d, ids[:end]), atol=1e-9, rtol=1e-9)
        log_p, state = d.step(ids[end], state)


@pytest.mark.parametrize("role", ["phase1", "baseline"])
def test_several_texts_go_on_from_one_state(role):
    d = decoder(role)
    _, state = d.prefill(text(20))
    other = d.step(5, state)[1]
    first = d.step(7, d.step(6, state)[1])[0]
    d.step(9, other)
    assert torch.equal(d.step(7, d.step(6, state)[1])[0], first)


@pytest.mark.parametrize("length", [3, 20])
def test_the_state_that_a_graph_reads_is_equal_to_the_one_it_is_made_from(length):
    d = decoder(shape=replace(SHAPE, ar_ssm_window=8, copy_window=16), dtype=torch.float64)
    _, state = d.prefill(text(length))
    fixed = static(state, 16)
    for id in text(30, seed=1):
        (log_p, state), (same, fixed) = d.step(id, state), d.step(id, fixed)
        torch.testing.assert_close(same, log_p, atol=1e-9, rtol=1e-9)
    again = d.step(3, fixed)[1]
    assert [t.shape for layer in again for t in layer if torch.is_tensor(t)] == [
        t.shape for layer in fixed for t in layer if torch.is_tensor(t)
    ]


def test_a_step_from_the_state_that_a_graph_reads_reads_no_number_from_the_device():
    d = decoder(shape=replace(SHAPE, ar_ssm_window=8, copy_window=16))
    fixed, ids = static(d.prefill(text(20))[1], 16), torch.tensor([[3]])
    read = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            read.append(f is torch.ops.aten._local_scalar_dense.default)
            return f(*args, **(kwargs or {}))

    d.model._check = lambda ids: None  # reads ids on the CPU alone
    with Watching():
        d.advance(ids, fixed)
    assert read and not any(read)


def test_the_state_stops_growing_with_its_windows_and_that_of_attention_does_not():
    shape = replace(SHAPE, ar_ssm_window=8, copy_window=16)
    engine, transformer = decoder(shape=shape), decoder("baseline", shape)
    sizes = [[state_bytes(d.prefill(text(length))[1]) for length in (20, 200)] for d in (engine, transformer)]
    assert sizes[0][0] == sizes[0][1] and sizes[1][1] == 10 * sizes[1][0]


def peak_of(d, steps, state):
    tensors = 0

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            nonlocal tensors
            out = f(*args, **(kwargs or {}))
            for t in out if isinstance(out, list | tuple) else [out]:
                if torch.is_tensor(t):
                    tensors = max(tensors, t.untyped_storage().nbytes())
            return out

    gc.collect()
    tracemalloc.start()
    with Counting():
        for number, id in enumerate(text(steps)):
            _, state = d.step(id, state)
            if number % 10 == 0:  # what waits for the collector is no part of a text
                gc.collect()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, tensors


def test_memory_of_many_tokens_is_that_of_few():
    d = decoder(shape=replace(SHAPE, ar_ssm_window=8, copy_window=16))
    _, state = d.prefill(text(100))
    peak_of(d, 20, state)  # what is made once
    (few, widest), (many, widest_of_many) = peak_of(d, 20, state), peak_of(d, 150, state)
    assert widest_of_many == widest and many < 1.2 * few + 60_000  # the objects of 130 states would be 200 kB


@pytest.mark.parametrize("role", ["phase1", "baseline"])
def test_a_long_prompt_never_has_logits_of_all_its_positions(role):
    d = decoder(role, replace(SHAPE, d_model=16, vocab_size=4096, ar_ssm_window=8, copy_window=16))
    widest = 0

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            nonlocal widest
            out = f(*args, **(kwargs or {}))
            for t in out if isinstance(out, list | tuple) else [out]:
                if torch.is_tensor(t) and t.shape[-1:] == (4096,):
                    widest = max(widest, t.numel())
            return out

    with Watching():
        d.prefill(text(2 * PIECE + 5))
    assert widest <= 16 * 4096


def test_table_and_order_are_made_once(monkeypatch):
    d = decoder()
    made = []
    monkeypatch.setattr(d.model.embedding, "table", lambda dtype: made.append(dtype))
    _, state = d.prefill(text(5))
    d.step(1, state)
    assert made == []


def operators(d, state):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        d.step(1, state)
    return sorted((e.key, e.count) for e in seen.key_averages())


def test_a_step_does_the_same_work_at_every_position():
    d = decoder(shape=replace(SHAPE, ar_ssm_window=8, copy_window=16))
    assert operators(d, d.prefill(text(20))[1]) == operators(d, d.prefill(text(900))[1])


def test_half_precision_is_that_of_evaluation():
    d = decoder()
    ids = text(70)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = d.model(torch.tensor([ids]))[0, -1].log_softmax(-1)
    half = Decoder(d.model, BYTES, torch.bfloat16)
    torch.testing.assert_close(half.prefill(ids)[0], expected, atol=0.05, rtol=0.01)
    assert half.model.blocks[0].mlp.down_proj.weight.dtype == torch.bfloat16 and half.model.norm.weight.dtype == torch.float32


@pytest.fixture
def checkpoint(tmp_path):
    return untrained(tmp_path, SHAPE)


def untrained(folder, shape, role="phase1"):
    """A checkpoint of a new model; the texts of an engine do not end."""
    torch.manual_seed(0)
    state = make_train_state(LanguageModel(model_config(role, shape)), TrainConfig(), "cpu")
    if role == "phase1":
        state.model.embedding.output_bias.data[BYTES.end_of_text] = -1e4  # so that no text ends
    facts = {"data": {"name": "a", "split": "train", "sha256": "b"}, "tokenizer": BYTES.fingerprint, "seq_length": 8}
    facts |= {"trained_tokens": 0, "train_seconds": 0.0, "loss": 0.0, "finished": False}
    save_checkpoint(folder, state, facts, resumable=False)
    keep_tokenizer(folder, BYTES)
    return folder


def test_a_checkpoint_brings_its_tokenizer(checkpoint):
    d = load(checkpoint)
    log_p, state = d.prefill(d.tokenizer.encode("The "))
    log_p, state = d.step(int(log_p.argmax()), state)
    assert log_p.shape == (300,) and d.tokenizer.fingerprint == BYTES.fingerprint and d.trained_length == 8
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mixer, device, graphs", [("ar_ssm", "cuda", True), ("ar_ssm", "cpu", False), ("attention", "cuda", False)])
def test_graphs_are_taken_where_they_can_be_if_nothing_is_said(tmp_path, monkeypatch, mixer, device, graphs):
    folder = untrained(tmp_path, SHAPE, "phase1" if mixer == "ar_ssm" else "baseline")
    asked = []
    monkeypatch.setattr("phase1.generation.decoder.Decoder", lambda *given, **_: asked.append(given[3]))
    monkeypatch.setattr(LanguageModel, "to", lambda self, device: self)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    load(folder, device=device, precision="fp32", cuda_graphs=None)
    assert asked == [graphs]


def test_what_a_prompt_and_a_step_give_is_what_one_pass_gives(checkpoint):
    decoder, ids = load(checkpoint), BYTES.encode("The ")
    log_p, state = decoder.prefill(ids)
    torch.testing.assert_close(log_p, whole(decoder, ids), atol=1e-5, rtol=1e-5)
    chosen = int(log_p.argmax())
    torch.testing.assert_close(decoder.step(chosen, state)[0], whole(decoder, [*ids, chosen]), atol=1e-5, rtol=1e-5)


def test_the_text_without_the_copy_head_is_that_of_the_output_alone(checkpoint):
    d = load(checkpoint, copy_head=False)
    assert d.model.copy_head is None
    assert d.prefill([1, 2, 3])[0].exp().sum().item() == pytest.approx(1, abs=1e-5)


def damage_tokenizer(folder):
    keep_tokenizer(folder, make_tokenizer("other", {c: i for i, c in enumerate(["<|endoftext|>", *byte_alphabet()])}, []))


def damage_weights(folder):
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("model-*")
    tensors = load_file(path)
    tensors["norm.weight"][0] = float("nan")
    save_file(tensors, path)


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "must hold tokenizer.json; got none"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json"),
        (damage_tokenizer, "must be that of the training"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "no checkpoint in"),
        (damage_weights, "norm.weight is not finite"),
    ],
)
def test_what_cannot_be_used_is_one_line(checkpoint, damage, says):
    damage(checkpoint)
    with pytest.raises(ValueError, match=rf"^[^\n]*{says}[^\n]*$"):
        load(checkpoint).prefill([1, 2])


def test_a_prompt_without_a_token_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        decoder().prefill([])


def test_a_text_in_place_of_its_ids_is_refused():
    with pytest.raises(ValueError, match=r"^ids must be numbers; got the text 'The '; give decoder\.tokenizer\.encode\(text\)$"):
        decoder().prefill("The ")


@pytest.mark.parametrize(
    "options, says",
    [
        ({"precision": "fp8"}, "--precision must be one of auto, fp16, bf16, fp32; got 'fp8'; correct it"),
        ({"device": "gpu"}, "the device must be one of PyTorch's, cpu or cuda; got 'gpu'; correct it"),
        ({"device": "cuda:99"}, r"the device must be there; got cuda:99, and PyTorch sees \d+ GPUs; try cpu"),
    ],
)
def test_a_precision_or_device_that_is_not_there_is_refused(checkpoint, options, says):
    with pytest.raises(ValueError, match=f"^{says}$"):
        load(checkpoint, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_graphs_need_a_gpu():
    with pytest.raises(ValueError, match="--cuda-graphs needs a GPU"):
        Decoder(decoder().model, BYTES, cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [1, 200])
def test_a_graph_gives_what_steps_give(length):
    """As far as both are from float64: where a normed vector has nearly no length, a rounding error is many times itself."""
    model = decoder(shape=replace(SHAPE, copy_window=100)).model
    exact = Decoder(deepcopy(model).double(), BYTES)
    model = model.cuda()
    decoders = [exact, Decoder(model, BYTES), Decoder(model, BYTES, cuda_graphs=True)]
    off = [0.0, 0.0, 0.0]
    for seed in range(2):  # the second text begins in the graph of the first
        found = [d.prefill(text(length, seed)) for d in decoders]
        for id in text(150, seed + 5):
            off = [max(worst, (log_p.cpu() - found[0][0]).abs().max().item()) for worst, (log_p, _) in zip(off, found)]
            found = [d.step(id, state) for d, (_, state) in zip(decoders, found)]
    assert off[1] < 0.02 and off[2] < 2 * off[1] + 1e-4
    assert decoders[2]._replay._replay is not None


@pytest.fixture
def imitated_graphs(monkeypatch):
    """Launches that compute what was captured once more, in the same tensors, without a GPU."""

    def captured(step, warm=False):
        result = step()
        return lambda: result.copy_(step()), result

    monkeypatch.setattr(replay, "captured", torch.inference_mode()(captured))
    monkeypatch.setattr(replay, "warm_up", lambda step: None)
    monkeypatch.setattr("phase1.generation.decoder.require_gpu_for_graphs", lambda device: None)


def test_a_launched_step_gives_what_steps_give_in_any_mode(imitated_graphs):
    model = decoder(shape=replace(SHAPE, copy_window=100)).model
    plain, graphs = Decoder(model, BYTES), Decoder(model, BYTES, cuda_graphs=True)
    for seed in range(2):  # the second text begins in the graph of the first
        (log_p, state), (same, fixed) = plain.prefill(text(200, seed)), graphs.prefill(text(200, seed))
        for number, id in enumerate(text(20, seed + 5)):
            torch.testing.assert_close(same, log_p, atol=1e-5, rtol=1e-5)
            with torch.inference_mode(number % 2 == 0):
                (log_p, state), (same, fixed) = plain.step(id, state), graphs.step(id, fixed)
    assert graphs._replay._replay is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the graph itself is tested")
def test_a_launched_step_in_the_kernels_of_one_token_gives_what_steps_give(imitated_graphs, monkeypatch):
    """In Triton's interpreter without a GPU."""
    pytest.importorskip("triton")
    model = decoder(shape=replace(SHAPE, ar_ssm_window=8, copy_window=16)).model
    plain, graphs, ids = Decoder(model, BYTES), Decoder(model, BYTES, cuda_graphs=True), text(20, 1)
    (log_p, state), wanted = plain.prefill(text(6)), []
    for id in ids:
        log_p, state = plain.step(id, state)
        wanted.append(log_p)
    monkeypatch.setattr("phase1.layers.ar_ssm.step_runs", lambda proj, p, window: proj.shape[1] == 1)
    (_, state), found = graphs.prefill(text(6)), []
    for id in ids:
        log_p, state = graphs.step(id, state)
        found.append(log_p.clone())
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), atol=1e-4, rtol=1e-4)
    assert graphs._replay._replay is not None


def test_two_texts_in_one_graph_are_refused_before_one_takes_the_state_of_the_other(imitated_graphs):
    graphs = Decoder(decoder(shape=replace(SHAPE, copy_window=100)).model, BYTES, cuda_graphs=True)
    _, state = graphs.prefill(text(200, 0))
    for id in text(5, 1):
        _, state = graphs.step(id, state)
    _, later = graphs.step(3, state)
    with pytest.raises(ValueError, match="the newest state must go on; got an older one"):
        graphs.step(4, state)
    expected, _ = graphs.step(5, later)
    assert expected.isfinite().all()
    _, other = graphs.prefill(text(200, 2))
    graphs.step(1, other)
    with pytest.raises(ValueError, match="got an older one"):
        graphs.step(4, later)
