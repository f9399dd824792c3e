"""Exported models in transformers; skipped without that package (pip install -e '.[test-hf]')."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import phase1.hf
from phase1.cli import main
from phase1.generation import Sampling, continuation, load, state_bytes
from tests.generation.test_decoder import BYTES, checkpoint  # noqa: F401, a fixture

ROOT = Path(__file__).parents[2]
SMALL = {
    "vocab_size": 512, "d_model": 64, "n_layers": 2, "n_heads": 4, "htt_dense_rows": 16, "htt_groups": 16, "ar_ssm_window": 8,
    "copy_window": 16, "ar_ssm_max_rank": 8, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.randint(1, 512, (3, 24), generator=torch.Generator().manual_seed(0))
EVERY = torch.ones_like(IDS)


def model(**changes):
    torch.manual_seed(0)
    return phase1.hf.Phase1ForCausalLM(phase1.hf.Phase1Config(**(SMALL | changes))).eval()


@pytest.fixture
def folder(checkpoint, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("export") / "model"
    assert main(["export", "--checkpoint", str(checkpoint), "--out-dir", str(out)]) == 0
    return out


def gradients(m):
    m.train().zero_grad()
    m(IDS, labels=IDS).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in m.named_parameters()}
    m.eval()
    return found


def test_a_loaded_model_has_every_buffer_and_gives_the_same_logits_and_gradients(tmp_path):
    m = model()
    m.save_pretrained(tmp_path)
    same = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {n: b.tolist() for n, b in m.named_buffers()} == {n: b.tolist() for n, b in same.named_buffers()}
    assert torch.equal(m(IDS).logits, same(IDS).logits)
    ours, theirs = gradients(m), gradients(same)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_exported_folder_is_the_model_of_the_checkpoint(folder, checkpoint):  # noqa: F811
    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(0, 257, (1, 30))
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, load(checkpoint).model(ids))
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_generate_feeds_a_token_at_a_time_and_gives_the_argmax_of_whole_passes():
    m, fed = model(), []
    step = m.model.continue_from
    m.model.continue_from = lambda ids, *rest, **options: (fed.append(ids.shape[1]), step(ids, *rest, **options))[1]
    cached = m.generate(IDS, attention_mask=EVERY, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    assert fed == [24] + [1] * 63
    m.model.continue_from = step
    uncached = m.generate(IDS, attention_mask=EVERY, max_new_tokens=64, min_new_tokens=64, do_sample=False, use_cache=False)
    ids = IDS
    with torch.no_grad():
        for _ in range(64):
            logits = m(ids).logits[:, -1]
            logits[:, 0] = -torch.inf  # end-of-text, by min_new_tokens
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, ids) and torch.equal(uncached, ids)


@pytest.mark.parametrize("changes", [{}, {"mixer": "attention", "embedding": "dense", "copy_head": False}])
def test_beams_with_a_cache_are_those_without(changes):
    m = model(**changes)
    options = {"attention_mask": EVERY, "max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert torch.equal(m.generate(IDS, **options), m.generate(IDS, **options, use_cache=False))
    assert m.generate(IDS, attention_mask=EVERY, max_new_tokens=3, do_sample=True, num_return_sequences=2).shape[0] == 6


def test_the_cache_stops_growing():
    m = model()
    sizes = []
    with torch.no_grad():
        for length in (100, 5000):
            sizes.append(state_bytes(m(torch.randint(1, 512, (1, length))).cache.states))
    assert sizes[0] == sizes[1]


def test_gradient_checkpointing_changes_no_gradient():
    m = model()
    plain = gradients(m)
    m.gradient_checkpointing_enable()
    again = gradients(m)
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_the_loss_of_micro_batches_adds_up_to_that_of_the_batch():
    m = model()
    parts = [m(row[None], labels=row[None], num_items_in_batch=3 * 23).loss for row in IDS]
    torch.testing.assert_close(sum(parts), m(IDS, labels=IDS).loss)


LEFT = torch.tensor([[0] * 4 + [1] * 20] * 3)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m: m(IDS, attention_mask=1 - LEFT.roll(2, 1)), "a mask must be padding on the left"),
        (lambda m: m(IDS, attention_mask=1 - LEFT), "a mask must be padding on the left"),  # on the right, with a cache
        (lambda m: m(IDS, attention_mask=0 * LEFT), "a token that is no padding"),
        (lambda m: m(IDS[:, -1:], attention_mask=0 * EVERY, cache=m(IDS).cache), "no padding"),
        (lambda m: m(IDS[:1], cache=m(IDS).cache), "of as many rows"),
        (lambda m: m(IDS, past_key_values=1), "called cache"),
        (lambda m: m(IDS[:1, :0]), r"at least one token; got shape \(1, 0\); begin with end-of-text"),
        (lambda m: m(IDS[:1, :0].float(), logits_to_keep=1), "at least one token"),  # what a tokenizer makes of ''
        (lambda m: m.generate(IDS[:1, :0], max_new_tokens=3), "at least one token"),
        (lambda m: m(), "at least one token; got none"),
        (lambda m: m(inputs_embeds=torch.zeros(1, 3, 64)), "got inputs_embeds; give the ids"),
        (lambda m: m(IDS, output_hidden_states=True), "got output_hidden_states=True"),
        (lambda m: m(IDS, output_attentions=True), "got output_attentions=True"),
        (lambda m: m.generate(IDS, output_hidden_states=True, return_dict_in_generate=True, max_new_tokens=3), "got output_hidden_states=True"),
        (lambda m: m.resize_token_embeddings(600), "train with a larger --vocab-size"),
        (lambda m: m.generate(IDS, attention_mask=EVERY, assistant_model=model(), max_new_tokens=3), "assisted generation"),
        (lambda m: m.generate(IDS, attention_mask=EVERY, penalty_alpha=0.6, top_k=4, max_new_tokens=3), "Contrastive Search"),
    ],
)
def test_what_is_not_supported_is_one_line(call, says):
    with pytest.raises(ValueError, match=rf"^[^\n]*{says}[^\n]*$"), torch.no_grad():
        call(model())


def test_padding_on_the_right_is_accepted_in_a_loss():
    m, mask = model(), torch.tensor([[1] * 20 + [0] * 4] * 3)
    labels = IDS.masked_fill(mask == 0, -100)
    torch.testing.assert_close(m(IDS, attention_mask=mask, labels=labels).loss, m(IDS[:, :20], labels=IDS[:, :20]).loss)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from phase1.commands.export import END_OF_TEXT, _json

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(BYTES.to_json())
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "split_special_tokens": True}
    (folder / "tokenizer_config.json").write_text(_json(words))
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=12) | st.sampled_from(["<|endoftext|>", " <|endoftext|> é 日本 \n\n x"]))
def test_the_tokenizer_gives_our_ids_and_the_text_again(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == BYTES.encode(text) and tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_exported_tokenizer_says_so_itself(folder):
    exported = AutoTokenizer.from_pretrained(folder)
    text = "Hello <|endoftext|> world"
    assert exported(text)["input_ids"] == BYTES.encode(text) and exported.padding_side == "left"
    assert exported.decode(exported("Hello world")["input_ids"]) == "Hello world" and exported.eos_token_id == BYTES.end_of_text


def test_it_works_without_network_and_remote_code(folder):
    code = (
        "from transformers import AutoTokenizer\n"
        f"print(AutoTokenizer.from_pretrained({str(folder)!r})('The')['input_ids'])\n"  # without phase1
        "import socket\ndef no(*a, **k): raise RuntimeError('network')\nsocket.socket.connect = no\nimport phase1.hf\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m, t = AutoModelForCausalLM.from_pretrained({str(folder)!r}), AutoTokenizer.from_pretrained({str(folder)!r})\n"
        "print(m.generate(**t('The', return_tensors='pt'), max_new_tokens=3, do_sample=False).shape[0])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(["src", *filter(None, sys.path)]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.split("\n")[:2] == [str(BYTES.encode("The")), "1"], done.stderr[-2000:]


def test_an_index_that_no_row_has_is_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embedding.anchors"][0] = 10**6
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"^anchors of rows [^\n]*export it again$"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("version", ["4.57.6", "5.23.9", "6.0.0"])
def test_other_versions_of_transformers_are_refused_in_one_line(version):
    with pytest.raises(ImportError, match=rf"^phase1.hf needs transformers>=5.24,<6; got {version}; install one of these$"):
        phase1.hf.require_supported(version)
    phase1.hf.require_supported("5.24.0.dev0")


def test_the_supported_range_and_the_plug_in_of_lm_eval_are_those_of_the_package():
    """One range everywhere. Its lower end, the newest too as yet, is what `constraints.txt` installs: a newer one has to be tested beside it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with pytest.raises(ImportError) as refused:
        phase1.hf.require_supported("5.0.0")
    (supported,) = project["optional-dependencies"]["hf"]
    assert supported in str(refused.value) and supported in phase1.hf.__doc__
    pins = (ROOT / "constraints.txt").read_text().split()
    assert supported.replace(">=", "==").partition(",")[0] + ".0" in pins, "test the oldest supported transformers beside the new one"
    (name, target), *_ = project["entry-points"]["lm_eval.models"].items()
    pytest.importorskip("lm_eval")
    found = EntryPoint(name, target, "lm_eval.models").load()
    assert name == "phase1" and found.__module__ == "phase1.lm_eval"


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}])
def test_a_model_loads_in_half_precision_and_by_a_device_map(tmp_path, options):
    m = model()
    m.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffer.to(buffers[name].dtype), buffers[name]) for name, buffer in m.named_buffers())
    assert gradients(loaded).keys() == gradients(m).keys() and bool(loaded(IDS).logits.isfinite().all())


@pytest.mark.parametrize("fault", ["no", "of another shape", "that is not finite"])
def test_a_folder_without_every_weight_is_refused(tmp_path, fault):
    model().save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.blocks.1.mlp.down_proj.weight"
    weight = tensors.pop(name)
    if fault != "no":
        tensors[name] = weight[:3].clone() if fault == "of another shape" else weight.fill_(torch.nan)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    said = f"no {name}" if fault == "no" else f"{name} {fault}"
    with pytest.raises(ValueError, match=rf"^a folder must hold every weight of its model; got {said}; [^\n]*export it again$"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_the_table_is_made_once_for_all_steps_of_generate():
    m, made = model(), []
    rows = m.model.rows
    m.model.rows = lambda: (made.append(1), rows())[1]
    m.generate(IDS, attention_mask=EVERY, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert len(made) == 1


def test_sampling_cut_to_the_likeliest_token_is_greedy():
    m = model()
    options = {"attention_mask": EVERY, "max_new_tokens": 6, "min_new_tokens": 6}
    greedy = m.generate(IDS, do_sample=False, **options)
    assert torch.equal(m.generate(IDS, do_sample=True, top_k=1, **options), greedy)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.6}])
def test_generate_draws_from_the_distribution_that_phase1_generate_draws_from(options):
    m = model()
    log_p = 3 * m(IDS).logits[:, -1].log_softmax(-1)
    config = GenerationConfig(do_sample=True, temperature=0.8, **({"top_k": 0} | options))
    m.generation_config = config
    for row, theirs in zip(log_p, m._get_logits_processor(config, 24)(IDS, log_p.clone()).double().softmax(-1), strict=True):
        p, ids = Sampling(0.8, **options).distribution(row)
        ours = torch.zeros(512, dtype=torch.double).scatter(0, ids, p)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.6}])
def test_sampled_texts_of_a_seed_are_those_of_phase1_generate(folder, monkeypatch, options):
    m, decoder, prompts = AutoModelForCausalLM.from_pretrained(folder).eval(), load(folder), IDS % 256
    for one in (m.model, decoder.model):
        one.embedding.output_bias.data[BYTES.vocab_size :] = 5.0  # rows for no token, likely ones
    chances = [np.random.Generator(np.random.PCG64([7, row])) for row in range(3)]

    def draw(p, num_samples):  # as `phase1 generate` does, in place of torch's own random numbers
        cuts = [int((row > 0).sum()) if options else None for row in p]
        drawn = [Sampling(1.0, top_k=k).next_id(row.log(), c.random()) for row, k, c in zip(p, cuts, chances, strict=True)]
        return torch.tensor(drawn)[:, None]

    monkeypatch.setattr(torch, "multinomial", draw)
    asked = {"do_sample": True, "temperature": 0.8, "top_k": 0} | options
    theirs = m.generate(prompts, attention_mask=EVERY, max_new_tokens=64, **asked)[:, 24:].tolist()
    for row, prompt in enumerate(prompts.tolist()):
        log_p, state = decoder.prefill(prompt)
        ours = list(continuation(decoder, log_p, state, Sampling(0.8, **options), max_tokens=64, seed=7, sample=row))
        assert theirs[row] == ours and len(ours) == 64
    assert max(map(max, theirs)) < BYTES.vocab_size < m.config.vocab_size  # no row without a token is drawn


def test_the_seed_decides_what_generate_draws():
    m, options = model(), {"attention_mask": EVERY, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": True}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(m.generate(IDS, **options))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_an_export_of_a_model_that_transformers_saved_again_is_read_by_generate(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    ours, again = load(folder), load(tmp_path)
    assert torch.equal(ours.prefill([1, 2, 3])[0], again.prefill([1, 2, 3])[0]) and again.trained_length == ours.trained_length
