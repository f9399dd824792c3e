"""A trained model that reads a text piece by piece and says what may follow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phase1.data.tokenizer_files import TOKENIZER, folder_tokenizer, gpt2_tokenizer
from phase1.data.tokenizers import Tokenizer
from phase1.device import require_device
from phase1.generation.replay import GraphedStep
from phase1.model import LanguageModel
from phase1.training.checkpoint import load_model, model_config_of, read_index, training_facts
from phase1.training.exported import is_exported, load_exported
from phase1.training.step import compute_dtype, require_gpu_for_graphs

PIECE = 1024  # tokens of a prompt at a time: what a piece needs besides the state does not grow with the prompt
States = list[Any]


class Decoder:
    """log p of the next token after a text, from a state that holds all of the text that later tokens need.

    >>> decoder = load("results/checkpoints/train")                           # doctest: +SKIP
    >>> log_p, state = decoder.prefill(decoder.tokenizer.encode("The "))      # doctest: +SKIP
    >>> log_p, state = decoder.step(int(log_p.argmax()), state)               # doctest: +SKIP

    The table is built once. Every step has the same cost and a state of the same size, except with attention, whose keys and
    values grow with the text. A step does not change the state it is given, so several texts can continue from one.

    Args:
        model: changed to evaluation; weights that autocast would cast at every step are cast here.
        tokenizer: of the model; None where ids are all there is.
        dtype: of the autocast region; float32 is no autocast.
        cuda_graphs: launch each step as one CUDA graph, once its state has stopped growing. Every state can go on once.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None,
        dtype: torch.dtype = torch.float32,
        cuda_graphs: bool = False,
        trained_length: int | None = None,
    ) -> None:
        self.model, self.dtype, self.trained_length = model.eval(), dtype, trained_length
        self._tokenizer = tokenizer
        self.device = model.norm.weight.device
        with torch.inference_mode(), self._autocast():
            self._rows = model.rows()
        if dtype != torch.float32:
            self._rows = self._rows._replace(table=self._rows.table.to(dtype))
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.to(dtype)
        self._replay = None
        if cuda_graphs:
            require_gpu_for_graphs(self.device.type)
            if model.config.mixer == "attention":
                raise ValueError("--cuda-graphs needs a state that does not grow; got a model with attention; leave it out")
            self._replay = GraphedStep(self.advance, model.config.copy_window)

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None
        return self._tokenizer

    def prefill(self, ids: Sequence[int], state: States | None = None) -> tuple[Tensor, States]:
        """log p (V,) of the token after `ids`, which follow the text that left `state`; and the new state.

        Raises ValueError without a token, for a text in place of its ids, and where the model gives no finite number.
        """
        if isinstance(ids, str):
            raise ValueError(f"ids must be numbers; got the text {ids!r:.40}; give decoder.tokenizer.encode(text)")
        if not len(ids):
            raise ValueError("a text must have at least one token; got none; begin with end-of-text")
        given = torch.tensor([list(ids)], device=self.device)
        for piece in given.split(PIECE, 1):
            log_p, state = self.advance(piece, state)
        assert state is not None
        if bool(log_p.isnan().any()):
            raise ValueError("the model must give numbers; got NaN; its training diverged: train again")
        return log_p[0], state

    def step(self, id: int, state: States) -> tuple[Tensor, States]:
        """log p (V,) of the token after `id`, which follows the text that left `state`; and the new state."""
        ids = torch.tensor([[id]], device=self.device)
        log_p, state = self.advance(ids, state) if self._replay is None else self._replay(ids, state)
        return log_p[0], state

    @torch.inference_mode()
    def advance(self, ids: Tensor, state: States | None) -> tuple[Tensor, States]:
        """log p (B, V), at least float32, of the token after `ids` (B, T); and the new state. All T at once."""
        with self._autocast():
            logits, state = self.model.continue_from(ids, state, self._rows, last=True)
        logits = logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.model.copy_head is not None else logits.log_softmax(-1), state

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def load(
    folder: Path | str,
    *,
    device: str = "cpu",
    precision: str = "auto",
    tokenizer: str | None = None,
    copy_head: bool = True,
    cuda_graphs: bool | None = False,
) -> Decoder:
    """The model and the tokenizer of a checkpoint, or of a folder that `phase1 export` wrote.

    Args:
        precision: auto, fp16, bf16 or fp32 as in training.
        tokenizer: gpt2 or a folder with tokenizer.json, for a checkpoint of an earlier version, which has none.
        copy_head: whether the copy head, if there is one, is mixed in.
        cuda_graphs: as in Decoder; None is wherever it can be.
    Raises:
        ValueError: missing or damaged, without a tokenizer or with another one than that of the training; no such device or
            precision.
    """
    require_device(device)
    dtype = compute_dtype(precision, device)
    folder = Path(folder).expanduser()
    if is_exported(folder):
        model, facts = load_exported(folder)
    else:
        index = read_index(folder)
        if own := model_config_of(index).model:
            expected = f"{folder} must hold a model of phase1, which generate and export know alone; got {own}"
            raise ValueError(f"{expected}; build it in Python: docs/extending.md")
        facts = training_facts(folder, index)
        model, _ = load_model(folder)
    assert isinstance(model, LanguageModel)  # what both give where no --model is allowed
    found = _tokenizer(folder, tokenizer)
    if facts["tokenizer"] not in (None, found.fingerprint):
        remedy = "give --tokenizer gpt2 or the folder of the right tokenizer.json"
        if tokenizer is not None and (folder / TOKENIZER).is_file():
            remedy = "leave --tokenizer out: the checkpoint has its own"
        raise ValueError(
            f"the tokenizer must be that of the training, fingerprint {facts['tokenizer']:.12}; got {found.name}, "
            f"{found.fingerprint:.12}; {remedy}"
        )
    if not copy_head:
        model.copy_head = None
    if cuda_graphs is None:
        cuda_graphs = device == "cuda" and model.config.mixer != "attention"
    return Decoder(model.to(device), found, dtype, cuda_graphs, trained_length=facts["seq_length"])


def _tokenizer(folder: Path, given: str | None) -> Tokenizer:
    if given == "gpt2":
        return gpt2_tokenizer()
    if given is None and not (folder / TOKENIZER).is_file():
        raise ValueError(
            f"{folder} must hold {TOKENIZER}; got none, as in checkpoints of earlier versions; run the command that trained it "
            "again, which adds it, or give --tokenizer gpt2 or a folder"
        )
    return folder_tokenizer(folder if given is None else Path(given).expanduser())


def state_bytes(state: States) -> int:
    """Bytes of the state that a text leaves for later tokens."""
    return sum(part.numel() * part.element_size() for layer in state for part in layer if isinstance(part, Tensor))
