"""Checkpoints as models of Hugging Face transformers: `import phase1.hf` registers them, no code travels with a folder.

    import phase1.hf
    model = AutoModelForCausalLM.from_pretrained("folder")     # that `phase1 export` wrote

Needs `pip install 'transformers>=5.24,<6'`; nothing else of this package imports it.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from phase1.config import ModelConfig, present_settings
from phase1.layers.token_table import HTTTable
from phase1.model import LanguageModel
from phase1.model import Rows as TableRows
from phase1.ops.cross_entropy import IGNORE
from phase1.tensor_names import RENAMED, not_finite, pattern_of

try:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError("phase1.hf needs a package; run `pip install 'transformers>=5.24,<6'`") from error


def require_supported(version: str) -> None:
    """Raise ImportError for a version of transformers that would give wrong texts: 5.23 has another name for the cache."""
    if not (5, 24) <= tuple(int(part) for part in version.split(".")[:2]) < (6, 0):
        raise ImportError(f"phase1.hf needs transformers>=5.24,<6; got {version}; install one of these")


require_supported(transformers.__version__)
LORA_MODULES = r"model\.blocks\.\d+\.(mixer|mlp)\.(?!rank_gate)\w+"
"""`target_modules` of a LoRA: the projections of mixers and MLPs. The rank gate is read by kernels, which see no adapter."""
OLD_NAMES = {pattern_of(old): new for old, new in RENAMED.items()}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}


class Phase1Config(PretrainedConfig):
    """The fields of `ModelConfig`, flat."""

    model_type = "phase1"
    keys_to_ignore_at_inference = ["cache"]
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}

    def __init__(self, **values: Any) -> None:
        values = present_settings(values)
        for name, default in DEFAULTS.items():
            setattr(self, name, values.pop(name, default))
        super().__init__(**({"tie_word_embeddings": False, "use_cache": True} | values))

    def native(self) -> ModelConfig:
        return ModelConfig(**{name: getattr(self, name) for name in DEFAULTS})


class Rows(NamedTuple):
    """Rows of a batch whose texts begin at one column; the model runs them as if they were alone."""

    places: Tensor  # (n,) in the batch
    padding: int  # columns before their text
    states: list[Any] | None  # of `LanguageModel.continue_from`


class Phase1Cache:
    """What earlier columns of a batch left, and how many there were, padding among them."""

    is_compileable = False

    def __init__(self, groups: list[Rows]) -> None:
        self.groups, self.length = groups, 0
        self.table: TableRows | None = None  # made once for all steps

    @property
    def states(self) -> list[Any]:
        """Of all layers and groups."""
        return [state for group in self.groups for state in group.states or []]

    @property
    def is_linear(self) -> list[bool]:
        return [True]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        groups = []
        for group in self.groups:
            inside = rows.to(group.places.device)[:, None] == group.places
            places, taken = inside.nonzero(as_tuple=True)
            if len(places):
                groups.append(Rows(places, group.padding, _taken(group.states, taken)))
        self.groups = groups

    def batch_select_indices(self, rows: Tensor) -> None:
        self.reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        count = sum(len(group.places) for group in self.groups)
        self.reorder_cache(torch.arange(count).repeat_interleave(repeats))


def _taken(states: list[Any] | None, rows: Tensor) -> list[Any] | None:
    """The states of some rows, in their order."""
    if states is None:
        return None
    return [
        state._replace(
            **{name: part.index_select(0, rows) for name, part in state._asdict().items() if isinstance(part, Tensor)},
            **({"store": None} if hasattr(state, "store") else {}),
        )
        for state in states
    ]


@dataclasses.dataclass
class Phase1Output(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Phase1Cache | None = None


class Phase1ForCausalLM(PreTrainedModel, GenerationMixin):
    """`LanguageModel` behind the interface of transformers.

    Rows of a batch may be padded on the left: those of one length run together, as if no other were there, so that padding
    changes nothing. A batch costs a pass for every length in it.
    """

    config_class = Phase1Config
    base_model_prefix = "model"
    _is_stateful = True
    _no_split_modules = ["Block"]
    supports_gradient_checkpointing = True

    def __init__(self, config: Phase1Config) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.native())
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, *args: Any, key_mapping: dict[str, str] | None = None, output_loading_info: bool = False, **options: Any
    ) -> Any:
        """As in the base class; a folder of an earlier version, whose tensors have other names, loads too.

        Raises ValueError where a weight is missing, of another shape or not finite: nothing would give it a start.
        """
        names = OLD_NAMES | (key_mapping or {})
        model, info = super().from_pretrained(*args, key_mapping=names, output_loading_info=True, **options)
        _require_whole(model, info)
        used = model._weight_conversions  # save_pretrained would undo them, and write the old names
        model._weight_conversions = [renaming for renaming in used if not OLD_NAMES.keys() & set(renaming.source_patterns)]
        return (model, info) if output_loading_info else model

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HTTTable):  # from_pretrained fills buffers that are in no file with what was in memory
            if wrong := module.index_out_of_range():
                raise ValueError(f"{wrong}; the file is damaged: export it again")
            module.build_inverse_index()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> None:
        return None

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **options: Any) -> nn.Module:
        if new_num_tokens not in (None, self.config.vocab_size):
            rows = self.config.vocab_size
            raise ValueError(
                f"the token table has {rows} rows for good; got {new_num_tokens}; train with a larger --vocab-size"
            )
        return self.model.embedding

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, cache: Phase1Cache | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> dict[str, Any]:
        _require_known(options)
        if cache is not None:
            input_ids = input_ids[:, cache.length :]
        given: dict[str, Any] = {"input_ids": input_ids, "cache": cache, "attention_mask": attention_mask}
        if (positions := options.get("position_ids")) is not None:  # of all columns, where the caller gives them
            given["position_ids"] = positions[..., -input_ids.shape[1] :]
        return given | {"use_cache": options.get("use_cache"), "logits_to_keep": 1}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Phase1Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> Phase1Output:
        """Logits (B, T, V), log-probabilities with a copy head; with `labels` (B, T), the ids, the mean loss of the next ones.

        In training there is a loss and no logits. Logits of padding are 0. Raises ValueError for other masks than padding on
        the left and, where nothing is to follow, on the right, for ids without a token, for `inputs_embeds` and the states
        and attentions of layers, which there are not, and for `position_ids` that begin anew inside a row, as those of packed
        texts: the model knows the order of tokens alone, so that others change nothing.
        """
        _require_known(options)
        if input_ids is None or not input_ids.numel():
            got = "none" if input_ids is None else f"shape {tuple(input_ids.shape)}"
            raise ValueError(f"input_ids must have at least one token; got {got}; begin with end-of-text")
        if (positions := options.get("position_ids")) is not None:
            _require_one_text(positions, input_ids, attention_mask)
        if options.get("past_key_values") is not None:
            raise ValueError("the state is called cache; got past_key_values; use transformers 5.24 or newer")
        use_cache = not self.training if use_cache is None else use_cache
        if cache is None:
            groups = _groups(input_ids, attention_mask, alone=labels is not None or not use_cache)
        else:
            groups = _continued(cache.groups, input_ids, attention_mask)
        loss = None
        if labels is not None:
            loss = self._loss(groups, input_ids, labels, num_items_in_batch)
            if self.training:
                return Phase1Output(loss=loss)
        table = cache.table if cache is not None and cache.table is not None else self.model.rows()
        last, begin = logits_to_keep == 1, 0 if cache is None else cache.length
        parts, after = [], []
        for group in groups:
            ids = input_ids[group.places, max(0, group.padding - begin) :]
            part, states = self.model.continue_from(ids, group.states, table, last=last)
            parts.append(part)
            after.append(group._replace(states=states))
        logits = _joined(groups, parts, len(input_ids), 1 if last else input_ids.shape[1])
        if logits_to_keep > 1:
            logits = logits[:, -logits_to_keep:]
        if not use_cache:
            return Phase1Output(loss=loss, logits=logits)
        cache = Phase1Cache(after) if cache is None else cache
        cache.groups, cache.length = after, begin + input_ids.shape[1]
        cache.table = None if torch.is_grad_enabled() else table  # weights may change between the steps of a training
        return Phase1Output(loss=loss, logits=logits, cache=cache)

    def _loss(self, groups: list[Rows], ids: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
        """Mean over the labels, or their sum over `count`, those of all micro batches of a step."""
        self.model.config = dataclasses.replace(self.model.config, recompute="block" if self.gradient_checkpointing else "none")
        losses, numbers = [], []
        for places, padding, _ in groups:
            targets = labels[places, padding + 1 :]
            number = (targets != IGNORE).sum()
            if targets.shape[1] and (len(groups) == 1 or number):  # the mean over nothing is nan
                losses.append(self.model.loss(ids[places, padding:-1], targets))
                numbers.append(number)
        if len(losses) == 1 and count is None:
            return losses[0]
        total = sum((loss * number for loss, number in zip(losses, numbers)), torch.zeros((), device=ids.device))
        return total / (sum(numbers) if count is None else count)


def _require_whole(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise ValueError where the files have not given every weight, and a finite one."""
    fault = next((f"no {name}" for name in sorted(info["missing_keys"])), None)
    fault = fault or next((f"{name} of another shape" for name, *_ in info["mismatched_keys"]), None)
    if fault is None:
        weights = {n: p.detach() for n, p in model.named_parameters() if p.is_floating_point() and not p.is_meta}
        fault = f"{name} that is not finite" if (name := not_finite(weights)) else None
    if fault is not None:
        raise ValueError(f"a folder must hold every weight of its model; got {fault}; the file is damaged: export it again")


def _require_known(options: dict[str, Any]) -> None:
    """Raise ValueError for what transformers may ask of a model and this one would leave out without a word."""
    if options.get("inputs_embeds") is not None:
        raise ValueError("the model must get input_ids, which its copy head points to; got inputs_embeds; give the ids")
    for name in ("output_hidden_states", "output_attentions"):
        if options.get(name):
            raise ValueError(f"the model gives logits and its cache alone; got {name}=True; put a forward hook on model.blocks")


def _require_one_text(positions: Tensor, ids: Tensor, mask: Tensor | None) -> None:
    """Raise ValueError unless positions rise by one along the text of each row; where they begin, the model does not know."""
    expected = "position_ids must be one number a token, and rise by one along each row's text"
    remedy = "give each text a row of its own, and its padding in attention_mask"
    if positions.ndim != 2 or positions.shape[0] not in (1, len(ids)) or positions.shape[1] != ids.shape[1]:
        raise ValueError(f"{expected}; got shape {tuple(positions.shape)} of ids {tuple(ids.shape)}; {remedy}")
    wrong = positions.diff(dim=1) != 1
    if mask is not None:
        real = mask[:, -ids.shape[1] :].bool().to(wrong.device)
        wrong = wrong & real[:, 1:] & real[:, :-1]
    if bool(wrong.any()):
        raise ValueError(f"{expected}; got others, as of texts that are packed into a row; {remedy}")


def _joined(groups: list[Rows], parts: list[Tensor], rows: int, columns: int) -> Tensor:
    """Logits of all rows, (B, columns, V), 0 at padding."""
    if len(parts) == 1 and parts[0].shape[1] == columns:
        return parts[0]
    logits = parts[0].new_zeros(rows, columns, parts[0].shape[2])
    for group, part in zip(groups, parts):
        logits[group.places, columns - part.shape[1] :] = part
    return logits


def _groups(ids: Tensor, mask: Tensor | None, alone: bool) -> list[Rows]:
    """The rows by the padding in front of their texts; `alone`: nothing follows, so that padding at their ends is allowed."""
    everything = torch.arange(len(ids), device=ids.device)
    if mask is None or bool(mask.bool().all()):
        return [Rows(everything, 0, None)]
    real = mask.bool()
    if not bool(real.any(1).all()):
        raise ValueError("a row must have a token that is no padding; got none; begin with end-of-text")
    begins, ends = ~real[:, 0], ~real[:, -1]
    changes = (real[:, 1:] != real[:, :-1]).sum(1)
    if bool((changes != begins.int() + ends.int()).any()) or (bool(ends.any()) and not alone):
        raise ValueError("a mask must be padding on the left, or on the right of what nothing follows; got another")
    padding = (~real).int().cumprod(1).sum(1)
    return [Rows(everything[padding == width], width, None) for width in padding.unique().tolist()]


def _continued(groups: list[Rows], ids: Tensor, mask: Tensor | None) -> list[Rows]:
    if mask is not None and not bool(mask[:, -ids.shape[1] :].bool().all()):
        raise ValueError("what follows a cache must be no padding; got a mask with some; give rows of one length at a time")
    if sum(len(group.places) for group in groups) != len(ids):
        raise ValueError(f"a cache must be of as many rows as ids; got ids of {len(ids)} rows; begin without a cache")
    return groups


AutoConfig.register("phase1", Phase1Config, exist_ok=True)
AutoModelForCausalLM.register(Phase1Config, Phase1ForCausalLM, exist_ok=True)
