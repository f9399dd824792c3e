"""Sizes for a card, per command: what `--preset` means."""

from typing import TYPE_CHECKING, Any, Literal

SMOKE_SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "d_model": 128,
    "n_layers": 3,
    "n_heads": 4,
    "ar_ssm_window": 32,
    "copy_window": 64,
    "htt_dense_rows": 64,
    "htt_groups": 64,
}
_12_GB: dict[str, dict[str, Any]] = {
    "memory": {"batch_size": 4, "seq_length": 2048},
    "throughput": {"batch_size": 1, "seq_lengths": (256, 512, 1024, 2048, 4096)},
    "perplexity": {"batch_size": 16, "micro_batch_size": 16, "seq_length": 512},
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "rtx3080-10g": {
        "memory": {"batch_size": 4, "seq_length": 2048},
        "throughput": {"batch_size": 4, "seq_lengths": (512, 1024, 2048, 4096), "quadratic_control": True},
        "perplexity": {"batch_size": 8, "seq_length": 512},
    },
    "rtx3080m-8g": {
        "memory": {"batch_size": 2, "seq_length": 2048},
        # 256: four lengths over 8x decide
        "throughput": {"batch_size": 2, "seq_lengths": (256, 512, 1024, 2048), "quadratic_control": True},
        "perplexity": {"batch_size": 4, "micro_batch_size": 4, "seq_length": 512},
    },
    "rtx4090-24g": {
        "memory": {"batch_size": 8, "seq_length": 4096},
        "throughput": {"batch_size": 8, "seq_lengths": (512, 1024, 2048, 4096, 8192), "quadratic_control": True},
        "perplexity": {"batch_size": 16, "micro_batch_size": 16, "seq_length": 1024},
    },
    # Sizes that the original guide does not have. By the estimate all models of a command fit the card together, since CUDA
    # graphs keep the memory of every model of a throughput run; there is no room for a quadratic control beside them.
    "rtx3060-12g": _12_GB,
    "rtx4060-8g": {
        "memory": {"batch_size": 2, "seq_length": 2048},
        "throughput": {"batch_size": 1, "seq_lengths": (128, 256, 512, 1024)},
        "perplexity": {"batch_size": 8, "seq_length": 512},
    },
    "rtx4070-12g": _12_GB,
    "smoke": {  # six minutes on two CPU cores; memory is only estimated there, so its sizes can be the documented ones
        "memory": {},
        "throughput": SMOKE_SHAPE
        | {"batch_size": 1, "seq_lengths": (256, 512, 1024, 2048, 4096), "warmup_steps": 1, "measure_steps": 9},
        "perplexity": SMOKE_SHAPE
        | {"seq_length": 128, "train_tokens": 400_000, "train_batch_size": 16, "micro_batch_size": 16}
        | {"dataset_name": "builtin", "tokenizer": "bpe"},
    },
}
"""Defaults that a hardware preset replaces, per command; a flag on the command line wins over both."""
for _commands in PRESETS.values():  # a training alone has the sizes of the trainings that are compared
    _commands["train"] = {name: value for name, value in _commands["perplexity"].items() if name != "batch_size"}

if TYPE_CHECKING:
    Preset = str
else:
    Preset = Literal[tuple(PRESETS)]
