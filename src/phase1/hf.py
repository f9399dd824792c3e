"""Checkpoints as models of Hugging Face transformers: `import phase1.hf` registers them, no code travels with a folder.

    import phase1.hf
    model = AutoModelForCausalLM.from_pretrained("folder")     # that `phase1 export` wrote

Needs `pip install 'transformers>=5.24,<6'`; nothing else of this package imports it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from phase1.config import ModelConfig
from phase1.layers.token_table import HTTTable
from phase1.model import LanguageModel
from phase1.tensor_names import RENAMED, pattern_of

try:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError("phase1.hf needs a package; run `pip install 'transformers>=5.24,<6'`") from error

SUPPORTED = ((5, 24), (6, 0))  # at least the first, below the second; 5.23 has another name for the cache of generate()
if not SUPPORTED[0] <= tuple(int(part) for part in transformers.__version__.split(".")[:2]) < SUPPORTED[1]:
    raise ImportError(f"phase1.hf needs transformers>=5.24,<6; got {transformers.__version__}; install one of these")
OLD_NAMES = {pattern_of(old): new for old, new in RENAMED.items()}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(ModelConfig)}


class Phase1Config(PretrainedConfig):
    """The fields of `ModelConfig`, flat."""

    model_type = "phase1"
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}

    def __init__(self, **values: Any) -> None:
        for name, default in DEFAULTS.items():
            setattr(self, name, values.pop(name, default))
        super().__init__(**({"tie_word_embeddings": False, "use_cache": True} | values))

    def native(self) -> ModelConfig:
        return ModelConfig(**{name: getattr(self, name) for name in DEFAULTS})


class Phase1Cache:
    """The states of `LanguageModel.continue_from`, and how many tokens left them."""

    is_compileable = False

    def __init__(self) -> None:
        self.states: list[Any] | None = None
        self.length = 0

    @property
    def is_linear(self) -> list[bool]:
        return [True]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, rows: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def batch_select_indices(self, rows: Tensor) -> None:
        self.reorder_cache(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.states is not None:
            self.states = [
                state._replace(
                    **{n: change(part) for n, part in state._asdict().items() if isinstance(part, Tensor)},
                    **({"store": None} if hasattr(state, "store") else {}),
                )
                for state in self.states
            ]


@dataclasses.dataclass
class Phase1Output(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Phase1Cache | None = None


class Phase1ForCausalLM(PreTrainedModel, GenerationMixin):
    """`LanguageModel` behind the interface of transformers. Rows of a batch must be of one length: no padding on the left."""

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
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **options: Any) -> Any:
        """As in the base class; a folder of an earlier version, whose tensors have other names, loads too."""
        loaded = super().from_pretrained(*args, key_mapping=OLD_NAMES | (key_mapping or {}), **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        used = model._weight_conversions  # save_pretrained would undo them, and write the old names
        model._weight_conversions = [renaming for renaming in used if not OLD_NAMES.keys() & set(renaming.source_patterns)]
        return loaded

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
        if cache is not None:
            input_ids = input_ids[:, cache.length :]
        given = {"input_ids": input_ids, "cache": cache, "attention_mask": attention_mask}
        return given | {"use_cache": options.get("use_cache"), "logits_to_keep": 1}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: Phase1Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> Phase1Output:
        """Logits (B, T, V), log-probabilities with a copy head; with `labels` (B, T), the ids, the mean loss of the next ones.

        In training there is a loss and no logits. Raises ValueError for padding on the left, or anywhere with a cache.
        """
        if options.get("past_key_values") is not None:
            raise ValueError("the state is called cache; got past_key_values; use transformers 5.24 or newer")
        use_cache = not self.training if use_cache is None else use_cache
        _check_mask(attention_mask, alone=cache is None and (labels is not None or not use_cache))
        loss = None
        if labels is not None:
            loss = self._loss(input_ids, labels, num_items_in_batch)
            if self.training:
                return Phase1Output(loss=loss)
        last = logits_to_keep == 1
        logits, states = self.model.continue_from(input_ids, None if cache is None else cache.states, last=last)
        if not last and logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        after = None
        if use_cache:
            after = Phase1Cache() if cache is None else cache
            after.states, after.length = states, after.length + input_ids.shape[1]
        return Phase1Output(loss=loss, logits=logits, cache=after)

    def _loss(self, ids: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
        """Mean over the labels, or their sum over `count`, those of all micro batches of a step."""
        self.model.config = dataclasses.replace(self.model.config, checkpointing=bool(self.gradient_checkpointing))
        targets = F.pad(labels[:, 1:], (0, 1), value=-100)
        loss = self.model.loss(ids, targets)
        return loss if count is None else loss * (targets != -100).sum() / count


def _check_mask(mask: Tensor | None, alone: bool) -> None:
    if mask is None or bool(mask.bool().all()):
        return
    if not alone or bool((mask.diff(dim=1) > 0).any()):
        raise ValueError("rows must have no padding on the left, and none with a cache; give rows of one length at a time")


AutoConfig.register("phase1", Phase1Config, exist_ok=True)
AutoModelForCausalLM.register(Phase1Config, Phase1ForCausalLM, exist_ok=True)
