"""Files of the version before the tensors got Mamba-2's and PyTorch's names, in tests/fixtures/old_names, still load."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phase1.config import TrainConfig
from phase1.model import LanguageModel
from phase1.tensor_names import RENAMED, present_name, with_present_names
from phase1.training.checkpoint import load_model, model_config_of, read_index, resume, save_checkpoint
from phase1.training.step import make_train_state, train_step

OLD = Path(__file__).parent / "fixtures" / "old_names"
NAMES = {
    name for kind in ("engine", "transformer") for name in load_file(next((OLD / kind).glob("model-*.safetensors")))
}  # fmt: skip


def state_of(index):
    fields = index["train_config"]
    return make_train_state(LanguageModel(model_config_of(index)), TrainConfig(**fields), "cpu")


@pytest.mark.parametrize("kind", ["engine", "transformer"])
def test_a_checkpoint_of_old_names_gives_the_losses_it_gave_then(kind):
    model, facts = load_model(OLD / kind)
    ids = torch.tensor(facts["ids"])
    assert model.eval().nll(ids[:, :-1], ids[:, 1:])[0].sum().item() == pytest.approx(facts["nll_of_ids"], rel=1e-6)


def test_every_name_of_the_map_is_in_the_old_files_and_none_in_a_new_one(tmp_path):
    used = {old for old in RENAMED if any(present_name(name) != name and old in name for name in NAMES)}
    assert used == set(RENAMED)
    for kind in ("engine", "transformer"):
        index = read_index(OLD / kind)
        save_checkpoint(tmp_path / kind, state_of(index), index["facts"])
        for path in (tmp_path / kind).glob("*.safetensors"):
            assert all(present_name(name) == name for name in load_file(path))


def test_a_training_goes_on_from_old_names_as_from_new_ones(tmp_path):
    index = read_index(OLD / "engine")
    ids, ends = torch.tensor(index["facts"]["ids"]), []
    for folder in (OLD / "engine", tmp_path):
        state = state_of(index)
        resume(folder, state)
        if folder != tmp_path:
            save_checkpoint(tmp_path, state, index["facts"])
        train_step(state, [(ids[:, :-1], ids[:, 1:])])
        ends.append(state.model.state_dict())
    moments = load_file(next((OLD / "engine").glob("training-*.safetensors")))
    assert moments["blocks.0.mixer.log_rate:exp_avg"].abs().sum() > 0
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_names_of_whole_parts_are_renamed_and_others_left():
    assert present_name("blocks.1.mixer.out.weight") == "blocks.1.mixer.out_proj.weight"
    assert present_name("model.blocks.1.mlp.out.weight:exp_avg") == "model.blocks.1.mlp.down_proj.weight:exp_avg"
    assert present_name("embedding.positions_of") == "embedding.row_of_id"
    for name in ("blocks.1.mixer.out_proj.weight", "blocks.1.mixer.skipped", "xmixer.out.weight", "order"):
        assert present_name(name) == name


def test_a_file_with_both_names_of_a_tensor_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"mixer.D is there twice"):
        with_present_names({"mixer.D": 0, "mixer.skip": 1})
    folder = shutil.copytree(OLD / "engine", tmp_path / "both")
    path = next(folder.glob("model-*.safetensors"))
    tensors = load_file(path)
    save_file(tensors | {"blocks.0.mixer.D": tensors["blocks.0.mixer.skip"] + 1}, path)
    with pytest.raises(ValueError, match=r"blocks.0.mixer.D is there twice") as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_an_export_of_old_names_loads_in_transformers_and_is_saved_with_the_present_ones(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.24")
    import phase1.hf  # noqa: F401

    model, info = transformers.AutoModelForCausalLM.from_pretrained(OLD / "exported", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    facts = json.loads((OLD / "engine" / "checkpoint.json").read_text())["facts"]
    ids = torch.tensor(facts["ids"])
    nll = model.model.eval().nll(ids[:, :-1], ids[:, 1:])[0]
    assert nll.sum().item() == pytest.approx(facts["nll_of_ids"], rel=1e-6)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {f"model.{name}" for name in model.model.state_dict()}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
