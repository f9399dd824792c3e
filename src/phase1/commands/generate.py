"""`phase1 generate`: text from a trained model; the text on stdout, everything about it on stderr."""

import io
import itertools
import sys
import time
from pathlib import Path

from phase1.device import device_type
from phase1.errors import Unavailable, is_out_of_memory, reason
from phase1.generation import Decoder, Sampling, continuation, load, state_bytes, text_of
from phase1.runs import GenerateRun
from phase1.text import one_line, utf8_fault

BETWEEN = "\n----\n"  # samples


def main(run: GenerateRun) -> int:
    """Print every sample as it comes: the prompt and what the model says after it."""
    device = device_type()
    prompt = _prompt(run)
    try:
        decoder = load(
            run.checkpoint,
            device=device,
            precision=run.precision,
            tokenizer=run.tokenizer,
            copy_head=run.copy_head,
            cuda_graphs=run.cuda_graphs,
        )
        _generate(run, decoder, prompt)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise Unavailable(f"{reason(error)}; try a shorter prompt or a smaller model") from error
    return 0


def _generate(run: GenerateRun, decoder: Decoder, prompt: str) -> None:
    tokenizer = decoder.tokenizer
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]  # a document begins after the end of another
    if decoder.trained_length is not None and len(ids) > decoder.trained_length:
        note(f"the prompt has {len(ids):,} tokens; the model was trained on texts of {decoder.trained_length:,}")
    began = time.perf_counter()
    log_p, state = decoder.prefill(ids)
    prefill = time.perf_counter() - began
    sampling = Sampling(run.temperature, run.top_k, run.top_p)
    for sample in range(run.samples):
        write(BETWEEN if sample else "", prompt)
        began, taken = time.perf_counter(), itertools.count()
        new = continuation(decoder, log_p, state, sampling, max_tokens=run.max_tokens, seed=run.seed, sample=sample)
        for text in text_of((id for id, _ in zip(new, taken)), tokenizer):
            write(text)
        write("\n")
        seconds, count = time.perf_counter() - began, next(taken)
        ended = "the model ended the document" if count < run.max_tokens else "--max-tokens"
        note(f"{count:,} tokens in {seconds:.2f} s, {count / seconds:,.0f} tokens/s; ended by {ended}")
    note(f"prompt of {len(ids):,} tokens in {prefill:.2f} s; state {state_bytes(state):,} bytes on {decoder.device.type}")


def _prompt(run: GenerateRun) -> str:
    """What to go on from: a file is read as training data is; bytes of an argument that are no UTF-8 become U+FFFD."""
    if run.prompt_file is None:
        return (run.prompt or "").encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if run.prompt_file == "-":
        if sys.stdin is None:
            raise ValueError("--prompt-file - must have a standard input; got a closed one; pipe the text in, or name a file")
        data = sys.stdin.buffer.read()
    else:
        try:
            data = Path(run.prompt_file).expanduser().read_bytes()
        except OSError as error:
            raise ValueError(f"--prompt-file must be a readable file; got {run.prompt_file} ({error.strerror})") from error
    if (fault := utf8_fault(io.BytesIO(data))) is not None:
        name = "standard input" if run.prompt_file == "-" else run.prompt_file
        raise ValueError(f"--prompt-file must be UTF-8 text; {name}: {fault}")
    return data.decode("utf-8-sig")  # a byte order mark is none of the text


def write(*parts: str) -> None:
    """Print at once. A terminal gets no control characters but newlines and tabs, because the model may write any."""
    text = "".join(parts)
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    sys.stdout.write(text.encode(sys.stdout.encoding or "utf-8", "replace").decode(sys.stdout.encoding or "utf-8"))
    sys.stdout.flush()


def note(text: str) -> None:
    print(one_line(text), file=sys.stderr)
