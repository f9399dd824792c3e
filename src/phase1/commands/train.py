"""`phase1 train`: one model, from text to checkpoint, resumed where an earlier run stopped."""

from dataclasses import fields
from pathlib import Path

from phase1.config import DataConfig, ModelConfig, TrainConfig, flags, part_of
from phase1.data import load_corpus
from phase1.errors import Unavailable, is_out_of_memory, reason
from phase1.records.session import require_writable
from phase1.roster import report_key
from phase1.runs import PerplexityRun, TrainRun
from phase1.training.job import train_to_checkpoint


def main(run: TrainRun) -> int:
    """Train one model as the flags say; the checkpoint goes to --out-dir."""
    require_writable(Path(run.out_dir))
    corpus = load_corpus(run, vocab_size=run.vocab_size, need=("train",), train_tokens=run.train_tokens)
    model_config = part_of(ModelConfig, run)
    train_config = part_of(TrainConfig, run)
    try:
        facts = train_to_checkpoint(model_config, train_config, corpus, run.seq_length, Path(run.out_dir), label=run.mixer)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        smaller = f"try --micro-batch-size {max(1, run.micro_batch_size // 2)}, then a smaller --seq-length"
        raise Unavailable(f"{reason(error)}; {smaller}") from error
    print(f"trained on {facts['trained_tokens']:,} tokens in {facts['train_seconds']:.0f} s, last loss {facts['loss']:.3f}")
    if skipped := facts.get("skipped_steps"):
        print(f"of these steps {skipped} changed nothing: their gradients overflowed, and the loss scale was lowered")
    print(f"written: {run.out_dir}\n{next_command(run, model_config)}")
    return 0


def next_command(run: TrainRun, model: ModelConfig) -> str:
    """What evaluates the model of `run`: same data and tokenizer, windows of the same length."""
    data = {f.name: getattr(run, f.name) for f in fields(DataConfig)}
    evaluation = PerplexityRun(
        **data, vocab_size=run.vocab_size, seq_length=run.seq_length, checkpoint=(f"{report_key(model)}={run.out_dir}",)
    )
    return f"next: phase1 perplexity {flags(evaluation)}"
