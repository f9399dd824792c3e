"""`phase1 export`: a checkpoint as a folder for Hugging Face transformers, without any code in it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save

from phase1.data.tokenizer_files import TOKENIZER
from phase1.data.tokenizers import END_OF_TEXT
from phase1.files import atomic_write
from phase1.generation import load
from phase1.records.session import require_apart
from phase1.runs import ExportRun
from phase1.training.checkpoint import INDEX
from phase1.training.exported import CONFIG, PREFIX, TOKENIZER_KEY, WEIGHTS

README = """# A phase1 model

It needs the package `phase1` and `pip install 'transformers>=5.24,<6'`. This folder holds no code.

```python
import phase1.hf
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{folder}"), AutoTokenizer.from_pretrained("{folder}")
text = tokenizer("The function returns", return_tensors="pt")
print(tokenizer.decode(model.generate(**text, max_new_tokens=40, do_sample=True)[0]))
```

Rows of a batch may be padded on the left. The logits are log-probabilities where the model has a copy head.
"""


def main(run: ExportRun) -> int:
    """Write the folder; see `ExportRun` for the flags."""
    require_apart(run.out_dir, "--checkpoint", run.checkpoint)
    if (Path(run.out_dir) / INDEX).exists():
        raise ValueError(f"--out-dir must hold no checkpoint; got {run.out_dir}, which has {INDEX}; give a new folder")
    decoder = load(run.checkpoint, tokenizer=run.tokenizer)
    folder, tokenizer, model = Path(run.out_dir), decoder.tokenizer, decoder.model
    special = {f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "pad")}
    ids = {f"{name}_id": tokenizer.end_of_text for name in special}
    config: dict[str, Any] = {"model_type": "phase1", "architectures": ["Phase1ForCausalLM"], "dtype": "float32"}
    config |= {"use_cache": True, "tie_word_embeddings": False, "max_position_embeddings": decoder.trained_length}
    config |= ids | {TOKENIZER_KEY: tokenizer.fingerprint} | asdict(model.config)
    words: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", "model_max_length": 10**9}
    words |= special | {"split_special_tokens": True}  # text that spells end-of-text is text, as in training
    tokenless = list(range(tokenizer.vocab_size, model.config.vocab_size))  # a table may have rows for no token
    generation: dict[str, Any] = ids | ({"suppress_tokens": tokenless} if tokenless else {})
    tensors = {f"{PREFIX}{name}": tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    files = {
        TOKENIZER: tokenizer.to_json(),
        "tokenizer_config.json": _json(words),
        "generation_config.json": _json(generation),
        "README.md": README.format(folder=folder.name),
        CONFIG: _json(config),
    }
    replaced = (folder / CONFIG).is_file()
    atomic_write(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    for name, text in files.items():
        atomic_write(folder / name, text.encode())
    print(f"written: {folder}" + ", in place of the export that was there" * replaced)
    print('in Python: import phase1.hf; from transformers import AutoModelForCausalLM, after pip install "phase1[hf]"')
    print(f'           AutoModelForCausalLM.from_pretrained("{folder}"); {folder / "README.md"} has more')
    return 0


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
