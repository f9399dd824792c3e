"""The guides name every flag with its true default, and every command in them can be typed."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from phase1.cli import COMMANDS, parse

ROOT = Path(__file__).parents[1]
GUIDES = ("docs/benchmarking.md", "docs/ja/benchmarking.md")
PAGES = (*GUIDES, "README.md", "README.ja.md", "docs/hugging_face.md", "docs/ja/hugging_face.md")
SCRIPTS = {
    "validate_phase1_memory.py": "memory",
    "benchmark_phase1_throughput.py": "throughput",
    "validate_phase1_perplexity.py": "perplexity",
    "generate_phase1_comparison_tables.py": "tables",
}
FLAGS = sorted({"--" + f.name.replace("_", "-") for run in COMMANDS.values() for f in fields(run) if not f.metadata.get("positional")})


def commands(page):
    """(command, arguments) of every line of a shell block that starts one of ours."""
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                words = words[1:]
            words = words[:-1] if words[-1:] == ["&"] else words
            if words[:1] == ["python"] and len(words) > 1 and Path(words[1]).name in SCRIPTS:
                yield SCRIPTS[Path(words[1]).name], words[2:]
            elif words[:1] == ["phase1"] and words[1:2] != ["--help"]:
                yield words[1], words[2:]


@pytest.mark.parametrize("page", PAGES)
def test_every_documented_command_can_be_typed(page):
    found = list(commands(page))
    assert found
    for command, arguments in found:
        parse(command, [word for word in arguments if word not in ("...", "--help", "--print-config")])


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag_is_in_the_guide(guide, flag):
    text = (ROOT / guide).read_text()
    assert re.search(rf"{flag}(?![\w-])", text) or re.search(rf"--no-{flag[2:]}(?![\w-])", text)


@pytest.mark.parametrize("guide", GUIDES)
def test_defaults_in_the_tables_of_flags_are_those_of_the_program(guide):
    """Rows `| --flag | default | meaning |` whose default is a number."""
    rows = re.findall(r"^\| `--([a-z0-9-]+)` \| ([\d.e-]+) \|", (ROOT / guide).read_text(), re.MULTILINE)
    known = {}
    for run in COMMANDS.values():
        for f in fields(run):
            known.setdefault(f.name.replace("_", "-"), set()).add(f.default)
    assert len(rows) > 10
    for flag, default in rows:
        assert float(default) in known[flag], f"--{flag} {default}"
