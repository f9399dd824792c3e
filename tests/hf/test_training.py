"""transformers' Trainer and PEFT on exported models."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments

import phase1.hf
from phase1.config import TrainConfig
from phase1.training.step import make_train_state, train_step
from tests.hf.test_models import IDS, model

B, T, STEPS = 4, 12, 4
RATE = 1e-2
BATCHES = torch.randint(1, 512, (STEPS, B, T + 1), generator=torch.Generator().manual_seed(3))


class Texts(torch.utils.data.Dataset):
    """The rows of all batches, in order; labels are the ids, the first of which has nothing before it."""

    def __len__(self):
        return STEPS * B

    def __getitem__(self, i):
        ids = BATCHES.flatten(0, 1)[i]
        return {"input_ids": ids, "labels": torch.cat([torch.tensor([-100]), ids[1:]])}


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def ours():
    """The losses and weights of `phase1 train` on these batches at a constant rate, in float64: AdamW makes much of rounding."""
    state = make_train_state(model(rank_penalty=0.0).double().model, TrainConfig(learning_rate=RATE, precision="fp32"), "cpu")
    for group in state.optimizer.param_groups:
        group["lr"] = group["lr_scale"] * RATE
    losses = [train_step(state, [(batch[:, :-1], batch[:, 1:])]).item() for batch in BATCHES]
    return losses, state.model.state_dict()


def trainer(folder, micro=B, steps=STEPS, **options):
    m = model(rank_penalty=0.0).double()  # else a part of the Trainer's loss, and of ours only in the gradient
    state = make_train_state(m.model, TrainConfig(learning_rate=RATE, precision="fp32"), "cpu")
    for group in state.optimizer.param_groups:
        group["lr"] = group["lr_scale"] * RATE
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=micro, gradient_accumulation_steps=B // micro, max_steps=steps, max_grad_norm=1.0,
        logging_steps=1, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **options,
    )  # fmt: skip
    constant = torch.optim.lr_scheduler.LambdaLR(state.optimizer, lambda step: 1.0)
    return InOrder(m, arguments, train_dataset=Texts(), eval_dataset=Texts(), optimizers=(state.optimizer, constant))


def logged(done):
    return {row["step"]: row["loss"] for row in done.state.log_history if "loss" in row}


def assert_weights(m, wanted):
    for name, tensor in m.model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("micro", [B, 1])
def test_the_trainer_gives_the_losses_and_weights_of_phase1_train_however_the_batch_is_split(tmp_path, micro):
    losses, weights = ours()
    run = trainer(tmp_path, micro)
    run.train()
    assert logged(run) == pytest.approx(dict(enumerate(losses, 1)), rel=1e-5)
    assert_weights(run.model, weights)


def test_the_trainer_evaluates_saves_and_goes_on(tmp_path):
    whole = trainer(tmp_path / "a")
    whole.train()
    trainer(tmp_path / "b", steps=2).train()
    again = trainer(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert_weights(again.model, whole.model.model.state_dict())
    whole.model.eval()
    with torch.no_grad():
        rows = BATCHES.flatten(0, 1)
        wanted = torch.stack([whole.model(row[None], labels=row[None]).loss for row in rows]).mean().item()
    assert whole.evaluate()["eval_loss"] == pytest.approx(wanted, abs=1e-4)


def test_lora_trains_saves_and_merges(tmp_path):
    peft = pytest.importorskip("peft")
    m = model()
    before = m(IDS).logits
    lora = peft.get_peft_model(m, peft.LoraConfig(r=2, target_modules=phase1.hf.LORA_MODULES, task_type="CAUSAL_LM"))
    trained = [p for p in lora.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = lora.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and 0 < sum(p.numel() for p in trained) < sum(p.numel() for p in m.parameters()) / 2
    lora.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        after = lora(input_ids=IDS).logits
        loaded = peft.PeftModel.from_pretrained(model(), tmp_path).eval()
        assert torch.equal(loaded(input_ids=IDS).logits, after) and not torch.allclose(after, before)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, after, atol=1e-5, rtol=1e-5)
        assert merged.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, min_new_tokens=3).shape == (3, 27)
