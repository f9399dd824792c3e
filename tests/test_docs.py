"""Documents hold: commands can be typed, links lead somewhere, results and flags are generated, and no result is typed."""

import re
import shlex
import subprocess
import tomllib
from importlib import util
from pathlib import Path

import pytest

from phase1.checks import limits
from phase1.cli import parse
from phase1.machine.cards import CARDS, USABLE_SHARE
from phase1.tables.results_page import LIST, PAGE, between, generated

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.ja.md")
REFERENCES = ("docs/reference.md", "docs/ja/reference.md")
PAGES = sorted(str(page.relative_to(ROOT)) for place in ("*.md", "docs/**/*.md", "specs/**/*.md") for page in ROOT.glob(place))
BOTH = [READMES, *((f"docs/{Path(page).name}", page) for page in PAGES if "/ja/" in page and f"docs/{Path(page).name}" in PAGES)]
NUMBERS = {"docs/log.md", "docs/design.md", PAGE, *REFERENCES, *(page for page in PAGES if page.startswith("specs/"))}
"""Pages with typed or generated numbers: stories of measurements are in the log; others have sizes, counts, simulations, limits."""
SCRIPTS = {
    "validate_phase1_memory.py": "memory",
    "benchmark_phase1_throughput.py": "throughput",
    "validate_phase1_perplexity.py": "perplexity",
    "generate_phase1_comparison_tables.py": "tables",
}


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page):
    """(command, arguments) of every line of a shell block that starts one of ours."""
    for block in re.findall(r"```bash\n(.*?)```", text_of(page), re.DOTALL):
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
    for command, arguments in commands(page):
        parse(command, [word for word in arguments if word not in ("...", "--help", "--print-config")])


@pytest.mark.parametrize("english, japanese", BOTH)
def test_both_languages_have_the_same_commands_tables_and_sections(english, japanese):
    def shape(page):
        text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
        headings = [len(mark) for mark in re.findall(r"^(#+) ", text, re.MULTILINE)]
        return headings, len(re.findall(r"^\|", text, re.MULTILINE))

    assert shape(english) == shape(japanese)
    assert list(commands(english)) == list(commands(japanese))


def test_the_search_for_commands_finds_them():
    found = {page: len(list(commands(page))) for page in PAGES}
    assert min(found["docs/benchmarking.md"], found["docs/ja/benchmarking.md"]) > 30 and min(found[page] for page in READMES) > 5
    assert ("docs/benchmarking.md", "docs/ja/benchmarking.md") in BOTH


# ---- generated ----


def test_results_in_the_documents_are_those_of_the_records():
    stale = [str(path.relative_to(ROOT)) for path, text in generated(ROOT).items() if path.read_text(encoding="utf-8") != text]
    assert not stale, f"run phase1 tables --results-page; not as the records say: {stale}"


def test_a_page_without_its_markers_and_a_folder_without_the_list_are_refused(tmp_path):
    assert between("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb", "x", "new", "p") == "a\n<!-- x: begin -->\nnew\n<!-- x: end -->\nb"
    with pytest.raises(ValueError, match="must have the lines <!-- x: begin -->"):
        between("no markers", "x", "new", "README.md")
    with pytest.raises(ValueError, match="must run in a checkout"):
        generated(tmp_path)


def reference():
    spec = util.spec_from_file_location("reference", ROOT / "docs/reference.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("language, page", [("en", REFERENCES[0]), ("ja", REFERENCES[1])])
def test_the_reference_is_that_of_the_program(language, page):
    assert text_of(page) == reference().page(language), "run python docs/reference.py"


def test_nothing_is_described_that_the_program_does_not_have():
    module = reference()
    flags = {cls.__name__: {field.name for field in module.own_fields(cls)} for cls in module.declared()}
    models = {model.__name__: set(model.model_fields) for model in module.MODELS}
    for known, language, part in [(flags, "ja", "flag"), (models, "ja", "field"), (models, "en", "field")]:
        for name, lines in module.WORDS[language][part].items():
            assert set(lines) <= known[name], (language, part, name, set(lines) - known[name])


def test_a_flag_without_a_japanese_line_is_named():
    module = reference()
    del module.WORDS["ja"]["flag"]["TablesRun"]["formats"]
    with pytest.raises(ValueError, match=r"add a line formats = under \[ja.flag.TablesRun\]"):
        module.page("ja")


# ---- no typed result ----

UNITS = r"GB|GiB|MB|MiB|KB|KiB|TB|ms|µs|ns|s|seconds?|min|minutes?|h|hours?|%|points?|tokens/s|tok/s|×(?!\s*\d)|nats?|FLOPs?|秒|分|時間|倍|トークン/秒"
QUANTITY = re.compile(
    rf"(?<![\w.,-])[+−±-]?\d[\d,]*(?:\.\d+)?(?:\s*(?:to|and|〜|–|、|/)\s*[+−-]?\d[\d,.]*)*\s*(?:{UNITS})(?![A-Za-z/])"
    r"|(?:perplexity|perplexities|exponent|R²|パープレキシティ|指数)(?:\s*(?:of|is|was|=|:|は|：|が))*\s*\d[\d,.]*"
)


def definitions():
    """Quantities that are no results: limits, sizes of cards, and what the rules of the measurement are."""
    cards = {round(card.memory_bytes / 2**30) for card in CARDS.values()}
    allowed = {f"{limit / 1e9:.1f} GB" for limit in limits.CARD_LIMITS.values()} | {f"{size} GB" for size in cards}
    percents = (limits.REDUCTION_LIMIT, limits.DEGRADATION_LIMIT, limits.GATE_LIMIT, 100 * USABLE_SHARE, 95)  # 95: intervals
    allowed |= {f"{percent:g} %" for percent in percents} | {f"R² が {limits.R_SQUARED_LIMIT:g}"}
    return allowed | {"8×", "32×", "8 倍", "32 倍"}  # lengths of a verdict


SAID_OF_THE_ORIGINAL = {"1.5〜2 倍"}  # what docs/ja/benchmarking.md says does not hold


def prose(text):
    """A page without what is generated, code, links' targets and quoted names."""
    text = re.sub(r"<!-- ([\w ]+): begin -->.*?<!-- \1: end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "``", text)
    return re.sub(r"\]\([^)]*\)", "]", text)


def typed_results(text):
    return [found for found in QUANTITY.findall(prose(text)) if found.strip() not in definitions() | SAID_OF_THE_ORIGINAL]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in NUMBERS])
def test_no_measured_number_is_typed(page):
    assert typed_results(text_of(page)) == [], "results belong into records, stories into docs/log.md"


@pytest.mark.parametrize(
    "sentence",
    [
        "The engine takes 1.02 GB.", "a step of 38.6 ms", "about 850k tokens/s and 1,080 tokens/s", "perplexity 34.6", "−11.4 % better",
        "86.0 %, the best", "0.62 × the speed", "by 0.3 to 0.6 × slower", "exponent 0.773", "R² of 0.9999", "約 4.8 分でした",
        "30 秒かかります", "0.3〜0.6 倍の速さ", "5 minutes on two cores", "12 GiB", "3.4252 nats", "1.5 s",
    ],
)  # fmt: skip
def test_the_search_finds_typed_results(sentence):
    assert typed_results(sentence)


@pytest.mark.parametrize(
    "sentence",
    ["at most 7.2 GB, 9.0 GB: 90 % of the card", "an 8 GB card", "less than 5 % above", "the 95 % interval", "Python 3.11 or newer",
     "torch 2.7", "at least 4 lengths over 8×", "4 × 2,048 tokens", "`38.6 ms`", "<!-- results: begin -->\n1.02 GB\n<!-- results: end -->",
     "width 512, 8 layers", "WikiText-103", "status 3 says so"],
)  # fmt: skip
def test_the_search_leaves_definitions_sizes_and_generated_parts(sentence):
    assert typed_results(sentence) == []


def test_texts_of_the_results_page_have_no_number_either():
    listed = tomllib.loads(text_of(LIST))
    for section in listed["section"]:
        assert typed_results(section.get("text", "") + section["title"]) == []


# ---- shape ----


def test_the_readmes_are_read_in_a_minute_and_the_log_begins_with_what_was_learnt():
    assert all(text_of(page).count("\n") <= 120 for page in READMES)
    for page in READMES:  # what can be done with it is on the first screen
        screen = "\n".join(text_of(page).splitlines()[:24])
        assert re.search(r"^phase1 train .*\n(.*\n)*?phase1 generate .*\n(.*\n)*?phase1 export ", screen, re.MULTILINE), page
    first = re.match(r"# Log of experiments\n\n(## What we learned\n.*?)\n## ", text_of("docs/log.md"), re.DOTALL)
    assert first and first[1].count("\n") <= 25


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[`*]|\[|\]\([^)]*\)", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "``", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(file.resolve().relative_to(ROOT)), f"{page}: {target}"


def shown():
    """Pictures that documents show."""
    found = [(page, path) for page in PAGES for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text_of(page))]
    return {((ROOT / page).parent / path).resolve() for page, path in found}


def test_the_repository_keeps_records_and_the_pictures_that_documents_show():
    """Tables and plots are made from records; those of superseded code are in results/archive/, which no document draws from."""
    listing = subprocess.run(["git", "ls-files", "results"], capture_output=True, text=True, cwd=ROOT)
    if listing.returncode:
        pytest.skip("no checkout")
    files = [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).exists()]
    pictures = {file for file in files if file.suffix == ".png"}
    assert pictures <= shown(), "a picture that no document shows"
    listed = tomllib.loads(text_of(LIST))
    entries = [entry for section in listed["section"] for entry in section["table"]]
    others = {str(f.relative_to(ROOT)) for f in files if f.suffix not in (".json", ".jsonl", ".png")}
    texts = [*listed["screens"].values(), *(entry["targets"] for entry in entries if "targets" in entry)]
    assert others == {LIST, *(f"results/{name}" for name in texts)}
    assert not [f for f in files if f.name.endswith(".partial.json")], "a journal of an unfinished run"
    drawn = [entry["record"] for entry in entries if "record" in entry] + listed["cards"] + list(listed["summary"].values())
    assert all((ROOT / "results" / name).exists() and not name.startswith("archive/") for name in drawn)
    left = {str(f.relative_to(ROOT / "results")) for f in files if f.suffix in (".json", ".jsonl")} - set(drawn)
    assert not [name for name in left if not name.startswith("archive/")], "records that the page does not show: list or archive them"
