"""Words that the project gave up do not occur: one thing has one name, the field's own."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SEARCHED = (
    *("fedddp", "docs", "tests", "scripts", "slurm", ".ci", ".github"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml"),
)
BINARY = {".png", ".gz", ".pyc"}
CHANGES = r"CHANGELOG.md:\|"
"""The rows of the tables in which CHANGELOG.md lists old and new names."""
OLD_RUNS = (
    # Keys of before 0.1.0 that are refused with their new names, and the tests of that.
    r"fedddp/section.py:    \"(track|tracking|data|clock)\b.*\": \"",
    r"tests/test_(config|section|bad_input|cli|run_directory|inference|resume).py:.*"
    r"\b(track|skew|visit_s|data\.skew|with)\b.*",
)


class Word(NamedTuple):
    """A word of before."""

    pattern: str
    instead: str
    allowed: tuple[str, ...] = ()
    """Expressions of `file:line` where the word stays, each with its reason beside it."""
    where: tuple[str, ...] = SEARCHED
    flags: re.RegexFlag = re.IGNORECASE


CASE = re.RegexFlag(0)
WORDS = {
    # ---- classes, settings, metrics ----
    "Method": Word(r"\bMethods?\b", "Algorithm", flags=CASE),
    "method": Word(
        r"\b(own|federated|asynchronous|synchronous|every|each|which|other) methods?\b|^#+ .*methods?\b",
        "algorithm",
        where=("docs", "README.md", "CHANGELOG.md", "slurm", "scripts", "fedddp/recipes"),
    ),
    "Run": Word(r"\bclass Run\b|\bRun\(|import (.*, )?Run\b", "Config", flags=CASE),
    "sections": Word(
        r"\bclass (Data|Model|Local|Cohort|Topology|Evaluation|Checkpoint|Track)\b"
        r"|\b(Local|Cohort|Topology|Track|Evaluation)\(",
        "DataConfig, ModelConfig, ...",
        flags=CASE,
    ),
    "track": Word(
        r"\btrack\.\w|^\s*track:|\btrack: \{|\btracking\.with\b|\bwith_\b",
        "tracking, tracking.trackers",
        # The help must not show the old name.
        (*OLD_RUNS, r"tests/test_cli.py:    assert \"with_\" not in text"),
    ),
    "skew": Word(
        r"FeatureSkew|data\.skew|^\s*skew:|\{skew:|\"skew\"",
        "feature_shift; label skew is another thing",
        OLD_RUNS,
    ),
    "visit": Word(
        r"\bvisit(s|ed|ing|_s)?\b",
        "ClientContext, local training, client update",
        # The names of random streams decide the results.
        (*OLD_RUNS, r"fedddp/rng.py:\w+ = \"visit\""),
    ),
    "Outcome": Word(r"\boutcomes?\b", "Result"),
    "contribution": Word(r"\bcontribut(e|es|ed|ions?)\b", "ClientUpdate, aggregated"),
    "Total": Word(
        r"\bTotal\b(?=[\s(]*[=:|,)\]])|: Total\b|import (.*, )?Total\b", "AggregatedUpdate", flags=CASE
    ),
    "Server": Word(r"\bclass Server\b|: Server\b|import (.*, )?Server\b", "ServerState", flags=CASE),
    "combine": Word(r"time/combine|clients/contributed", "time/aggregate, clients/aggregated"),
    "flat names": Word(
        r"from fedddp import .*\b(FedAvg|FedProx|FedBuff|SCAFFOLD|Dirichlet|Krum|Mean|Virtual|LabelFlip)\b",
        "from fedddp import algorithms",
        flags=CASE,
    ),
    "least()": Word(r"\bleast\(", "min_clients()"),
    "counters": Word(
        r"\bcounters\b",
        "integer buffers",
        # An optimizer of torch counts its steps.
        (r"fedddp/algorithms/adaptive.py:.*Step counters",),
    ),
    "order": Word(r"\b(order|random) = stream\(|\b(order|random): (np\.random\.)?Generator", "rng"),
    "facts": Word(
        r"\bfacts?\b",
        "metadata",
        # A checkpoint of before 0.1.0 is recognised by its key.
        (r"fedddp/storage/checkpoint.py:.*\"facts\" in ", r"tests/test_(checkpoint|resume).py:.*\"facts\""),
    ),
    "plan()": Word(r"\bdef plan\b|import plan\b|\bplan\.(py|plan)\b", "dry_run", flags=CASE),
    # ---- the simulated clients and the asynchronous engine ----
    "liar": Word(r"\bliars?\b|\bclients? (that )?(lie|lies)\b", "malicious, Byzantine client"),
    "crew": Word(r"\bcrews?\b", "worker"),
    "meeting": Word(r"\bmeetings?\b", "synchronization point"),
    "tally": Word(r"\btall(y|ies)\b", "round statistics"),
    "flight": Word(r"(?<!\bin-)(?<!\bin )\bflights?\b", "in-flight client"),
    "ticket": Word(r"\btickets?\b", "dispatch id"),
    "land": Word(r"\bland(s|ed|ing)?\b", "complete"),
    "pulse": Word(r"\bpulses?\b", "heartbeat"),
    "look": Word(r"\bunlike cameras\b|\b(own|different|client's) looks?\b", "feature shift"),
    "stand-in": Word(r"\bstand-?ins?\b", "padding example, fake"),
    # ---- prose ----
    "whole": Word(r"\b(is|are|stays?|still|left|none) whole\b|\bwhole checkpoints?\b", "intact"),
    "damaged": Word(r"\bdamaged?\b", "corrupt"),
    "go on": Word(r"\b(go|goes|going|went|gone) on\b(?! tiny)", "resume, continue"),
    "anew": Word(r"\banew\b", "from scratch"),
    "told": Word(r"\b(told|tells?|said|says)\b", "logged, reported"),
    "way out": Word(r"\bways? out\b", "fix"),
    "a round": Word(
        r"\b(bytes|[kMG]B|lines?|rows?|seconds?|minutes?|clients?|examples?|steps?|batch(es)?|images?|shards?|times?"
        r"|once|twice|numbers?|draws?) an? (round|client|step|second|epoch|group|shard)\b"
        r"|\b(bytes|[kMG]B|threads?|process(es)?|examples?|images?|memory|once|line|GPU|GPUs) an? rank\b",
        "per round, per rank",
    ),
    "house": Word(r"\bhouses?\b|\bfloors\b|\bfloor (?!\()", "package, layer"),
    "room": Word(
        r"\brooms?\b",
        "module",
        # Space on a disk or on a line.
        (r".*\bmake room\b", r"fedddp/reporting/render.py:.*no room for"),
    ),
    "nobody": Word(r"\b(nobody|somebody|whoever|whom?so?ever)\b", "name the subject"),
    "mended": Word(r"\bmend(ed|s|ing)?\b", "fixed"),
    "riddles": Word(
        r"\bin peace\b|\bin vain\b|\blen[dt] a hand\b|\bno say\b|\bas ever\b|\bhow finely\b|\bwith an ear\b",
        "plain words",
    ),
}


def files(places: tuple[str, ...]) -> Iterator[Path]:
    """Yield the text files in `places`, this one left out."""
    for place in places:
        root = ROOT / place
        found = [root] if root.is_file() else sorted(root.rglob("*")) if root.is_dir() else []
        for path in found:
            hidden = "__pycache__" in path.parts or path.suffix in BINARY or path == Path(__file__)
            if path.is_file() and not hidden:
                yield path


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def found(word: Word) -> Iterator[str]:
    """Yield `file:line number: text` of every place where a word of before stands."""
    for path in files(word.where):
        name = path.relative_to(ROOT)
        if re.search(word.pattern, re.sub(r"[/._-]", " ", str(name)), word.flags):
            yield f"{name}: its name"
        text = text_of(path)
        # Most files have none, and one search of a file is faster than one of each line.
        lines = text.splitlines() if re.search(word.pattern, text, word.flags | re.MULTILINE) else []
        for number, line in enumerate(lines, 1):
            if re.search(word.pattern, line, word.flags):
                allowed = (CHANGES, *word.allowed)
                if not any(re.match(expression, f"{name}:{line}") for expression in allowed):
                    yield f"{name}:{number}: {line.strip()}"


@pytest.mark.parametrize("name", WORDS)
def test_a_word_of_before_does_not_occur(name: str) -> None:
    places = list(found(WORDS[name]))
    assert not places, f"write {WORDS[name].instead}:\n" + "\n".join(places)


def test_the_search_covers_code_tests_and_documentation() -> None:
    names = {str(path.relative_to(ROOT)) for path in files(SEARCHED)}
    assert {"fedddp/cli.py", "README.md", "docs/design.md", "tests/conftest.py", "scripts/test"} <= names
    assert {path.suffix for path in files(("fedddp",))} >= {".py", ".yaml"}
    assert len(names) > 150


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Method", "class Own(Method):"),
        ("visit", "def correct(self, visit):"),
        ("go on", "Go on with the same command."),
        ("a round", "500 bytes a round"),
        ("a round", "one line a rank"),
        ("flight", "the flights that arrived"),
        ("Total", "def step(self, server: Server, total: Total) -> None:"),
        ("Server", "def step(self, server: Server, total: Total) -> None:"),
        ("told", "The server is told."),
        ("house", "one house, five floors"),
        ("liar", "rules that hold when clients lie"),
        ("track", "track.with: []"),
        ("flat names", "from fedddp import FedAvg"),
        ("counters", "flat.counters"),
    ],
)
def test_the_search_finds_the_words(name: str, line: str) -> None:
    assert re.search(WORDS[name].pattern, line, WORDS[name].flags)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("flight", "in-flight clients, in_flight=3, three in flight"),
        ("Method", "a method of the class"),
        ("house", "math.floor(x), np.floor(y)"),
        ("a round", "at the end of a round; the seconds a rank waits"),
        ("skew", "0.1 is strong skew"),
        ("counters", "from collections import Counter"),
    ],
)
def test_the_search_leaves_other_meanings_alone(name: str, line: str) -> None:
    assert not re.search(WORDS[name].pattern, line, WORDS[name].flags)
