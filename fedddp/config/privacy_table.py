"""Which features go together with privacy, secure aggregation and compression: the table of docs/privacy.md.

Each cell builds the configuration of a small run; a test trains those that can be built.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fedddp.aggregation import Aggregation
from fedddp.algorithms import Algorithm
from fedddp.config.loader import build
from fedddp.config.schema import Config
from fedddp.privacy.config import Privacy
from fedddp.section import ConfigError, choices, class_name
from fedddp.secure import SecureAggregation
from fedddp.simulation.attacks import Attack, NoAttack
from fedddp.transport.codecs import Codec

SMALL = (
    "--data.examples 120 --data.clients 8 --cohort.size 3 --rounds 1 --model.name 2nn "
    "--aggregation.on_invalid_update skip"
)
"""Flags of a run that trains in a moment; every row of the table is trained so by a test."""

CENTRAL = "--privacy CentralDP --privacy.noise_multiplier 1 --privacy.delta 1e-3 --privacy.clip 1"
LOCAL = "--privacy LocalDP --privacy.epsilon 4 --privacy.delta 1e-3 --privacy.clip 1"
EXAMPLE = "--privacy ExampleDP --privacy.noise_multiplier 1 --privacy.delta 1e-2 --privacy.clip 1"
PROTECTIONS = {"CentralDP": CENTRAL, "LocalDP": LOCAL, "ExampleDP": EXAMPLE}

COLUMNS = {
    "CentralDP": CENTRAL,
    "... `strict`": f"{CENTRAL} --privacy.strict true",
    "LocalDP": LOCAL,
    "ExampleDP": EXAMPLE,
    "SecAgg": "--secure_aggregation SecAgg",
    "up: QSGD": "--transport.up QSGD",
    "up: TopK": "--transport.up TopK",
    "down: TopK": "--transport.down TopK",
}
"""Flags of what each column of the table asks for."""

NEEDS = {
    "AsyncSGD": "--local.steps 1",
    "DiLoCo": "--local.optimizer adamw --local.optimizer_state keep",
    "SyncSGD": "--local.steps 1",
    "FedBN": "--model.name resnet8-gn --model.norm batch",
}
"""What algorithms need of the other settings."""

SCENES = "--data.dataset scenes --data.examples 40"

OTHERS = {
    "`privacy=CentralDP` with Poisson cohorts": f"{CENTRAL} --cohort.sampling poisson",
    "`privacy=CentralDP` with `strict`": f"{CENTRAL} --privacy.strict true",
    "`privacy=LocalDP` with `strict`": f"{LOCAL} --privacy.strict true",
    "`privacy=ExampleDP` with `strict`": f"{EXAMPLE} --privacy.strict true",
    "`transport.down=QSGD`": "--transport.down QSGD",
    "`aggregation.sums=float32`": "--aggregation.sums float32",
    "`aggregation.clip_norm`": "--aggregation.clip_norm 1",
    "`aggregation.on_invalid_update=stop`": "--aggregation.on_invalid_update stop",
    "`aggregation.on_invalid_update=skip`": "--aggregation.on_invalid_update skip",
    "`aggregation.on_invalid_update=clip`": "--aggregation.on_invalid_update clip",
    "`cohort.sampling=poisson`": "--cohort.sampling poisson",
    "`cohort.extra`": "--cohort.extra 1",
    "`clock=Wall`": "--clock Wall",
    "`clock.deadline_s`": "--clock.deadline_s 5",
    "`clock.speed.dropout`": "--clock.speed.dropout 0.3",
    "`local.optimizer_state=keep`": "--local.optimizer adam --local.optimizer_state keep",
    "`local.momentum`, `local.clip_norm`": "--local.momentum 0.9 --local.clip_norm 1",
    "`local.precision=bf16`": "--local.precision bf16",
    "`local.accumulate`": "--local.accumulate 2",
    "`local.engine=eager`": "--local.engine eager",
    "`model.norm=group`": "--model.name resnet8-gn --model.norm group",
    "`evaluation.clients`": "--data.holdout 0.3 --evaluation.clients 3",
    "`checkpoint.best`": "--checkpoint.best [eval/accuracy,eval/loss]",
    "`evaluation.stop_after`": "--evaluation.stop_after 1",
    "`data.feature_shift`": "--data.feature_shift.rotation 30",
    "`task=MultiLabel`": f"--task MultiLabel {SCENES}",
    "`task=Segmentation`": f"--task Segmentation --model.name unet {SCENES}",
    "`task=Detection`": f"--task Detection --model.name retinanet-tiny --local.lr 0.01 {SCENES}",
    "`baseline=local`": "--baseline local --data.holdout 0.3",
    "`baseline=pooled`": "--baseline pooled",
}
"""The other features, with the flags that ask for them."""


class Feature(NamedTuple):
    """A row of the table."""

    title: str
    flags: str
    """That ask for it."""


def features() -> list[Feature]:
    """Return the algorithms, rules, attacks, protections and codecs of fedddp, and all other features."""
    families = {
        **{"algorithm": Algorithm, "aggregation": Aggregation, "attacks": Attack},
        **{"privacy": Privacy, "secure_aggregation": SecureAggregation, "transport.up": Codec},
    }
    found = []
    for key, family in families.items():
        for name in sorted(choices(family)):
            if "." not in name and name != class_name(NoAttack):
                flags = PROTECTIONS.get(name, f"--{key} {name}")
                found.append(Feature(f"`{key}={name}`", f"{flags} {NEEDS.get(name, '')}"))
    return [*found, *(Feature(title, flags) for title, flags in OTHERS.items())]


def meets(feature: Feature, column: str) -> bool:
    """Return whether a row and a column ask for different things, so that there is a pair."""
    return feature.flags.split()[0] != COLUMNS[column].split()[0]


def config_of(feature: Feature, column: str) -> Config:
    """Return the configuration of a small run with a feature and what a column asks for.

    Raises:
        ConfigError: they cannot be combined.
    """
    flags = f"{SMALL} {COLUMNS[column]} {feature.flags}"
    flags += " --cohort.size 7" if feature.title.startswith("`aggregation=") else ""  # Bulyan's fewest
    return build({}, flags.split())


def table() -> str:
    """Return the table in Markdown, and the reasons below it."""
    lines = [f"| feature | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    reasons: dict[str, int] = {}
    for feature in features():
        cells = [_cell(feature, column, reasons) for column in COLUMNS]
        lines.append(f"| {feature.title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())]) + "\n"


def _cell(feature: Feature, column: str, reasons: dict[str, int]) -> str:
    """Return "works", or the number of the reason why not."""
    if not meets(feature, column):
        return "–"
    try:
        config_of(feature, column)
    except ConfigError as error:
        return f"no ({reasons.setdefault(reason_of(str(error)), len(reasons) + 1)})"
    return "works"


def reason_of(error: str) -> str:
    """Return the reason of a refusal, without its fix and without the names of choices."""
    text = re.sub(r"^.*?cannot be combined( with [^:]*)?: ", "", error).partition("; ")[0]
    text = re.sub(r"\b((?:[a-z_]+\.)*[a-z_]+)=[\w.]+", r"`\1`", text)
    return text[0].upper() + text[1:] + "."
