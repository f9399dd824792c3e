"""The language model: token table, L blocks of mixer and MLP, tied output, loss."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from phase1.config import ModelConfig, Recompute
from phase1.layers.ar_ssm import ARSSM, from_first_key
from phase1.layers.attention import Attention
from phase1.layers.copy_head import NO_ID, CopyHead
from phase1.layers.mlp import MLP
from phase1.layers.token_table import DenseTable, HTTTable, OutputLevels
from phase1.ops.cross_entropy import IGNORE, USUAL_PARTS, tied_cross_entropy, tied_cross_entropy_reference, tied_nll
from phase1.vocabulary.statistics import TokenStatistics, TokenVectors

Choice = TypeVar("Choice")

MIXERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "attention": lambda c: Attention(
        c.d_model,
        c.n_heads,
        fused=c.attention == "fused",
        qk_norm=c.attention_qk_norm,
        conv=c.attention_conv,
        gate=c.attention_gate,
    ),
    "ar_ssm": lambda c: ARSSM(
        c.d_model,
        c.n_heads,
        max_rank=c.ar_ssm_max_rank,
        min_rank=c.ar_ssm_min_rank,
        window=c.ar_ssm_window,
        memory=c.ar_ssm_memory,
    ),
}
"""The mixer for each value of `ModelConfig.mixer`, called as (x (B, T, D), state) -> (y, state, effective rank or None)."""

TABLES: dict[str, Callable[[ModelConfig, TokenStatistics | TokenVectors | None], DenseTable | HTTTable]] = {
    "dense": lambda c, statistics: DenseTable(
        c.vocab_size,
        c.d_model,
        output_bias=c.dense_start == "statistics",
        vectors=statistics if isinstance(statistics, TokenVectors) else None,
    ),
    "htt": lambda c, statistics: HTTTable(
        c.vocab_size,
        c.d_model,
        rank=c.htt_rank,
        dense_rows=c.htt_dense_rows,
        groups=c.htt_groups,
        statistics=statistics if isinstance(statistics, TokenStatistics) else None,
        two_level=c.htt_output == "two_level",
    ),
}
"""The token table for each value of `ModelConfig.embedding`, started from statistics of the text, or at random (None)."""


States = list[Any]
"""What a text leaves for what follows it: the state of every block, then that of the copy head, where there is one."""

PARTS: dict[str, int] = {"none": 1, "selective": USUAL_PARTS, "block": 2 * USUAL_PARTS}
"""Into how many the logits of the loss are divided, by what is recomputed: the more, the smaller and slower."""

OUT = (".out_proj", ".down_proj", ".o_proj")
"""Names of the layers of a block that add to the residual stream; the last is what other people's mixers call theirs."""


class Outputs(NamedTuple):
    """What the loss of some tokens is computed from, besides the table."""

    states: Tensor  # (B, T, D), in the compute type, times the factor of the logits
    log_odds: Tensor | None = None  # (B, T), of the copy head
    gate: Tensor | None = None  # (B, T), of the copy head


class Rows(NamedTuple):
    """All rows of the token table, computed once for many calls of `continue_from`."""

    table: Tensor  # (V, D), in the order of rows
    row_of_id: Tensor  # (V,)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, mixer: Callable[[ModelConfig], nn.Module] | None = None) -> None:
        super().__init__()
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(config.d_model), nn.RMSNorm(config.d_model)
        self.mixer = (mixer or _named(MIXERS, "--mixer", config.mixer))(config)
        self.mlp = MLP(config.d_model)

    def prove_kernels(self, dtype: torch.dtype) -> None:
        """Run the self-check of the mixer's kernels for inputs of `dtype`; without this it runs at their first eager call."""
        if isinstance(self.mixer, ARSSM):
            self.mixer.prove_kernels(dtype)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any, Tensor | None]:
        """(B, T, D) -> (B, T, D), the mixer's state, and its effective rank or None."""
        y, state, effective_rank = self.mixer(self.mixer_norm(x), state)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state, effective_rank


class LanguageModel(nn.Module):
    """Causal language model; engine and baseline are this class with different configs.

    Args:
        config: sizes, mixer, table, loss and recomputation.
        statistics: of the training text (phase1.vocabulary.statistics): TokenStatistics for an HTT table, TokenVectors for a
            dense one that starts from them; None, to measure costs or to load a checkpoint: a random start.
        mixer: makes the sequence layer of a block, in place of what `config` names (`MIXERS` says what such a layer is).
    """

    def __init__(
        self,
        config: ModelConfig,
        statistics: TokenStatistics | TokenVectors | None = None,
        mixer: Callable[[ModelConfig], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = _named(TABLES, "--embedding", config.embedding)(config, statistics)
        if config.row_norm != 1:
            self.embedding.scale(config.row_norm)
        self.input_scale = math.sqrt(config.d_model) if config.input_scale is None else config.input_scale
        self.logit_scale = nn.Parameter(torch.full((1,), config.logit_scale)) if config.learnt_logit_scale else None
        self.blocks = nn.ModuleList(Block(config, mixer) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model)
        self._initialize()
        # last, so that equal seeds give the rest of the model equal weights with and without it
        key_dim = config.d_model // config.n_heads  # as wide as a head of the mixer
        self.copy_head = CopyHead(config.d_model, key_dim, config.copy_window) if config.copy_head else None
        self.two_level = config.embedding == "htt" and config.htt_output == "two_level"

    def _initialize(self) -> None:
        std = 0.02 * math.sqrt(512 / self.config.d_model)
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear) and module.bias is None:
                # the two projections of a block that add to the residual stream are scaled so that it keeps its size
                is_out = name.endswith(OUT)
                nn.init.normal_(module.weight, std=std / math.sqrt(2 * self.config.n_layers) if is_out else std)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, T, V) of the next token after each of `ids` (B, T)."""
        return self.continue_from(ids, None)[0]

    def continue_from(
        self, ids: Tensor, states: list[Any] | None, rows: Rows | None = None, *, last: bool = False
    ) -> tuple[Tensor, list[Any]]:
        """Logits (B, T, V) for `ids` that follow the text that left `states` (None: the beginning), and the new states.

        With a copy head they are the log-probabilities of its mixture.

        Args:
            rows: the result of `rows()`, to build the table once for many calls with the same weights.
            last: compute the logits of the last position only, (B, 1, V).
        """
        table, row_of_id = self.rows() if rows is None else rows
        past = None if states is None or self.copy_head is None else states[-1]  # the others are the blocks'
        hidden, states, _ = self._hidden(ids, table, states, keep_states=True)
        dtype = _compute_dtype(hidden)
        wanted = hidden[:, -1 if last else 0 :]
        logits = self._logits(self._scaled(wanted).to(dtype), table.to(dtype))[..., row_of_id]
        if self.copy_head is None:
            return logits, states
        logits, state = self.copy_head.mixture(hidden, ids, logits, past)
        return logits, [*states, state]

    def rows(self) -> Rows:
        """The token table and the row of every id in it, for `continue_from`."""
        all_ids = torch.arange(self.config.vocab_size, device=self.norm.weight.device)
        return Rows(self.table(), self.embedding.rows_of(all_ids))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """What training minimises: the cross-entropy of `losses` and, in training, the penalty of the rank gate."""
        loss, penalty = self.losses(ids, targets)
        return loss if penalty is None else loss + penalty

    def losses(self, ids: Tensor, targets: Tensor, state: States | None = None) -> tuple[Tensor, Tensor | None]:
        """Mean cross-entropy in nats of `targets` (B, T), -100 not scored, and in training the penalty of the rank gate.

        With a copy head it is that of the mixture, mean of nll - log(1 - g) - softplus(nll + o); nan if nothing is scored.
        state: what the text before `ids` has left, or for each part what makes it; None: nothing.
        """
        _require_same_shape(ids, targets)
        # Rebuild the table for the output: the (V, D) gradient of a table shared with the lookup would stay allocated
        # through the backward pass of all blocks.
        recompute = self.config.recompute if torch.is_grad_enabled() else "none"
        shared = self.table_of_loss() if recompute == "none" else None
        hidden, _, effective_rank = self._hidden(ids, shared, state, recompute=recompute)
        table = self.table_of_loss() if shared is None else shared
        past = None if state is None or self.copy_head is None else state[-1]
        pointer = () if self.copy_head is None else self.copy_head(hidden, ids, targets, past)[:2]
        loss = self.loss_of_outputs(Outputs(self._states(hidden), *pointer), table, targets, PARTS[self.config.recompute])
        return loss, self._penalty(effective_rank)

    def outputs_of_piece(
        self, ids: Tensor, targets: Tensor, rows: Tensor, state: States | None
    ) -> tuple[Outputs, Tensor | None, States]:
        """Of a piece of a text that follows the pieces which left `state` (None: none): what its loss is computed from, the
        penalty of the rank gate, and the state after it.

        Args:
            rows: `lookup(ids)`: pieces share a table.
        """
        past = None if state is None or self.copy_head is None else state[-1]
        recompute = self.config.recompute if torch.is_grad_enabled() else "none"
        hidden, blocks, effective_rank = self._of_rows(rows, state, from_first_key, recompute)
        pointer, after = [], blocks
        if self.copy_head is not None:
            *pointer, copied = self.copy_head(hidden, ids, targets, past)
            after.append(copied.padded(self.config.copy_window, NO_ID))
        return Outputs(self._states(hidden), *pointer), self._penalty(effective_rank), after

    def state_after_piece(self, ids: Tensor, rows: Tensor, state: States | None) -> States:
        """The state of `outputs_of_piece` alone, without the output's work."""
        past = None if state is None or self.copy_head is None else state[-1]
        hidden, after, _ = self._of_rows(rows, state, from_first_key)
        if self.copy_head is None:
            return after
        return [*after, self.copy_head.state_after(hidden, ids, past).padded(self.config.copy_window, NO_ID)]

    def loss_of_outputs(self, outputs: Outputs, table: Tensor, targets: Tensor, parts: int = USUAL_PARTS) -> Tensor:
        """Mean cross-entropy in nats of `targets` (B, T); `table` is that of `table_of_loss`.

        parts: how many times fewer logits than there may be at most to hold at once.
        """
        chunked = partial(tied_cross_entropy, parts=parts)
        op = chunked if self.config.loss == "chunked" else tied_cross_entropy_reference
        output, inner = self._operands(outputs.states, table, targets)
        added = None if inner is None else inner.view(targets.shape)  # terms of each target's loss besides `op`'s
        log_odds, gate = outputs.log_odds, outputs.gate
        if log_odds is not None and gate is not None:
            # -log(p q + exp(o)) = -log q - log(p + exp(o - log q)) for levels p and q
            log_odds = (log_odds if added is None else log_odds + added).flatten()
            added = F.softplus(gate) if added is None else F.softplus(gate) + added
        loss = op(*output, log_odds)
        if added is not None:
            scored = targets != IGNORE
            loss = loss + (added * scored).sum() / scored.sum().clamp(min=1)
        return loss

    def _penalty(self, effective_rank: Tensor | None) -> Tensor | None:
        if not self.training or effective_rank is None:
            return None
        return self.config.rank_penalty * effective_rank / self.config.ar_ssm_max_rank

    @torch.no_grad()
    def nll(self, ids: Tensor, targets: Tensor, piece_length: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Loss in nats of each target (B, T), 0 where it is -100, and the mean effective rank (None without a gate).

        piece_length: tokens of a text at a time, for less memory and the same losses; all of it by default, and with attention.
        """
        _require_same_shape(ids, targets)
        if ids.ndim != 2 or not ids.numel():
            raise ValueError(f"ids must be (B, T) and have a token; got shape {tuple(ids.shape)}; leave out a text without one")
        table, state = self.table_of_loss(), None
        size = ids.shape[1] if piece_length is None or self.config.mixer == "attention" else piece_length
        losses, ranks = [], []
        for piece, wanted in zip(ids.split(size, 1), targets.split(size, 1)):
            nll, effective_rank, state = self._nll(piece, wanted, table, state, keep_states=size < ids.shape[1])
            losses.append(nll)
            ranks += [] if effective_rank is None else [effective_rank * (piece.shape[1] / ids.shape[1])]
        return torch.cat(losses, 1), torch.stack(ranks).sum() if ranks else None

    def _nll(
        self, ids: Tensor, targets: Tensor, table: Tensor, state: States | None, keep_states: bool
    ) -> tuple[Tensor, Tensor | None, States]:
        """`nll` of a piece that follows the text which left `state`, and the state after it, if it is to be kept."""
        past = None if state is None or self.copy_head is None else state[-1]
        hidden, after, effective_rank = self._hidden(ids, table, state, keep_states)
        output, inner = self.output(hidden, table, targets)
        nll = tied_nll(*output)
        nll = (nll if inner is None else nll + inner).view(targets.shape)
        if self.copy_head is not None:
            log_odds, gate, copied = self.copy_head(hidden, ids, targets, past)
            after.append(copied)
            nll = (nll + F.softplus(gate) - F.softplus(nll + log_odds)).where(targets != IGNORE, 0)
        return nll, effective_rank, after

    def table(self) -> Tensor:
        """The token table (V, D), used for the input and, transposed, for the output."""
        return self.embedding.table(_compute_dtype(self.norm.weight))

    def table_of_loss(self) -> Tensor:
        """The table, (V, D) or with rows of zeros after them, as `loss_of_outputs` takes it; the lookup takes it too."""
        return self.embedding.table_of_loss(_compute_dtype(self.norm.weight))

    def lookup(self, ids: Tensor, table: Tensor) -> Tensor:
        """The rows of `ids` (B, T), (B, T, D)."""
        return F.embedding(self.embedding.rows_of(ids), table)

    def output(
        self, hidden: Tensor, table: Tensor, targets: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], Tensor | None]:
        """Arguments of the cross-entropy: states (N, D), table (V, D), the targets' rows (N,), output bias (V,); and None.

        For a two-level output the arguments are the first level's, and instead of None comes the loss of each target in the
        second, (N,), 0 for targets before the tail.
        """
        return self._operands(self._states(hidden), table, targets)

    def _states(self, hidden: Tensor) -> Tensor:
        """Final hidden states as the output takes them."""
        return self._scaled(hidden).to(_compute_dtype(hidden))

    def _operands(
        self, states: Tensor, table: Tensor, targets: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], Tensor | None]:
        """`output` for final states as `_states` gives them."""
        states = states.flatten(0, 1)
        rows = self.embedding.rows_of(targets).flatten()
        if not self.two_level:
            return (states, table, rows, self.embedding.output_bias), None
        levels = self._levels(table)
        start = len(table) - levels.groups.n
        inside = rows - start
        columns = torch.where(inside < 0, rows, start + inside // levels.groups.size)
        fused = self.config.loss == "chunked"
        inner = levels.groups.nll(levels.groups.states(states), levels.tail, levels.tail_bias, inside, fused)
        return (states, levels.rows, columns, levels.bias), inner

    def _logits(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Logits (B, T, V) in the order of rows; log-probabilities if the output has two levels."""
        if not self.two_level:
            logits = hidden @ table.T
            return logits if self.embedding.output_bias is None else logits + self.embedding.output_bias
        levels = self._levels(table)
        first = hidden @ levels.rows.to(hidden.dtype).T + levels.bias
        head, of_groups = first.log_softmax(-1).split([len(table) - levels.groups.n, len(levels.groups.rows)], -1)
        states = levels.groups.states(hidden)
        return torch.cat([head, levels.groups.log_probabilities(of_groups, states, levels.tail, levels.tail_bias)], -1)

    def _levels(self, table: Tensor) -> OutputLevels:
        assert isinstance(self.embedding, HTTTable)
        return self.embedding.levels_of_output(table)

    def _scaled(self, hidden: Tensor) -> Tensor:
        """`hidden` times the factor of the logits."""
        if self.logit_scale is not None:
            return hidden * self.logit_scale
        return hidden if self.config.logit_scale == 1 else hidden * self.config.logit_scale

    def _hidden(
        self,
        ids: Tensor,
        table: Tensor | None,
        states: States | None = None,
        keep_states: bool = False,
        recompute: Recompute = "none",
    ) -> tuple[Tensor, States, Tensor | None]:
        """Final hidden states (B, T, D), the blocks' states if `keep_states`, and the mean effective rank of all layers.

        recompute: what of the blocks' activations is computed again in the backward pass. If `table` is None, the lookup builds
            a table for itself, then too.
        """
        self._check(ids)
        rows = _run(lambda ids: self._embed(ids, table), ids, "none" if table is not None else "block")
        return self._of_rows(rows, states, _itself if keep_states else None, recompute)

    def _of_rows(
        self, rows: Tensor, states: States | None, keep: Callable[[Any], Any] | None, recompute: Recompute = "none"
    ) -> tuple[Tensor, States, Tensor | None]:
        """`_hidden` for the rows of the ids, (B, T, D); states are kept as `keep` makes them."""
        x = rows.to(self.norm.weight.dtype) * self.input_scale  # blocks add to it: not in half precision
        new_states, ranks = [], []
        for i, block in enumerate(self.blocks):
            past = None if states is None else states[i]

            def run(x: Tensor, block: nn.Module = block, past: Any = past) -> tuple[Tensor, Any, Tensor | None]:
                x, state, rank = block(x, past)
                return x, None if keep is None else keep(state), rank  # a state holds on to memory in proportion to T

            x, state, rank = _run(run, x, recompute)
            new_states += [] if keep is None else [state]
            ranks.append(rank)
        effective_rank = None if any(rank is None for rank in ranks) else torch.stack(ranks).mean()
        return self.norm(x), new_states, effective_rank

    def _embed(self, ids: Tensor, table: Tensor | None) -> Tensor:
        rows = self.lookup(ids, self.table() if table is None else table)
        return rows.to(self.norm.weight.dtype)  # here, so that a lookup that is recomputed keeps nothing but this

    def _check(self, ids: Tensor) -> None:
        # Only where reading the values is free: on a GPU it would stall every step, and indexing asserts there.
        if ids.ndim != 2:
            raise ValueError(f"ids must be (B, T); got shape {tuple(ids.shape)}")
        readable = type(ids) is Tensor and ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                found = low if low < 0 else high
                raise ValueError(
                    f"ids must be between 0 and {self.config.vocab_size - 1}; got {found}; "
                    "use the tokenizer the model was trained with, or a larger --vocab-size"
                )

    def prove_kernels(self, dtype: torch.dtype) -> None:
        """Let the kernels check themselves for inputs of `dtype`: in a compiled graph they cannot."""
        for block in self.blocks:
            block.prove_kernels(dtype)  # type: ignore[operator]

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: total, and those of the token table, the mixers, the MLPs and the copy head."""
        parts: dict[str, list[Any]] = {
            "embedding": [self.embedding],
            "mixer": [b.mixer for b in self.blocks],
            "mlp": [b.mlp for b in self.blocks],
            "copy_head": [] if self.copy_head is None else [self.copy_head],
        }
        counts = {name: sum(p.numel() for m in modules for p in m.parameters()) for name, modules in parts.items()}
        return {"total": sum(p.numel() for p in self.parameters())} | counts


def _named(choices: dict[str, Choice], flag: str, name: str) -> Choice:
    """The choice called `name`; a config from a file may name one that does not exist."""
    if name not in choices:
        raise ValueError(f"{flag} must be one of {', '.join(choices)}; got {name!r:.80}; correct it")
    return choices[name]


def _require_same_shape(ids: Tensor, targets: Tensor) -> None:
    if targets.shape != ids.shape:
        expected, got = tuple(ids.shape), tuple(targets.shape)
        raise ValueError(f"targets must have the shape of ids, {expected}; got {got}; give ids[:, :-1] and ids[:, 1:]")


def _itself(state: Any) -> Any:
    return state


def _run(function: Any, argument: Tensor, recompute: Recompute) -> Any:
    if recompute == "none":
        return function(argument)
    contexts: dict[str, Any] = {"context_fn": _selective} if recompute == "selective" else {}
    # preserve_rng_state=False: no block draws random numbers, and saving the generators takes longer than some blocks
    return checkpoint(function, argument, use_reentrant=False, preserve_rng_state=False, **contexts)


def _policy(_: Any, op: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    """Keep what takes arithmetic: attention, and products that make no fewer numbers than they take."""
    product = op is torch.ops.aten.mm.default and args[1].shape[1] >= args[1].shape[0]
    keep = product or "scaled_dot_product" in op.__name__
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


_selective = partial(create_selective_checkpoint_contexts, _policy)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """The autocast type if autocast is on, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype
