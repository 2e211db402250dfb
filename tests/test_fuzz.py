"""Any combination of settings trains two rounds, or is refused in one line; nothing else."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import event, given, settings
from hypothesis import strategies as st

from fedddp import ConfigError, Federation, load_config
from fedddp.aggregation import Aggregation, InvalidUpdateError
from fedddp.algorithms import Algorithm
from fedddp.config.loader import to_yaml
from fedddp.data.partition import Partition
from fedddp.section import choices
from fedddp.simulation.attacks import Attack
from fedddp.storage.history import read_rows
from fedddp.transport.codecs import Codec


def some(**options: list[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Draw a section: each of the settings is left out, or has one of its values."""
    return st.fixed_dictionaries(
        {}, optional={key: st.sampled_from(values) for key, values in options.items()}
    )


def own(base: type[Any]) -> list[str]:
    """Return the names of fedddp's own classes of a family."""
    return sorted(name for name in choices(base) if "." not in name)


CONFIGS = st.fixed_dictionaries(
    {
        "data": some(
            clients=[6, 7, 80, 3],
            partition=own(Partition),
            holdout=[0.3, 0.5, 0.0],
            augment=["none", "flip", "crop-flip"],
            image_size=[8, 12],
            memory=["auto", "device", "stream"],
            feature_shift=[{"rotation": 30.0}, {}],
        ),
        "model": some(
            name=["2nn", "lenet", "cnn", "resnet8-gn"],
            norm=["keep", "batch", "group"],
            freeze=[[], ["nothing"]],
        ),
        "local": some(
            epochs=[1, 2],
            steps=[1, 1, 3],
            batch_size=[1, 16, 1000],
            optimizer=["sgd", "sgd", "sgd", "adam", "adamw"],
            lr=[0.01, 1e-30, 1e9],
            momentum=[0.0, 0.0, 0.9],
            weight_decay=[0.0, 0.1],
            clip_norm=[1.0],
            schedule=["constant", "cosine", "step"],
            optimizer_state=["reset", "keep"],
            precision=["fp32", "bf16"],
            accumulate=[1, 3],
            channels_last=[True, False],
        ),
        "cohort": some(size=[2, 5, 6, 1], sampling=["fixed", "fixed", "poisson"], extra=[0, 0, 1]),
        "topology": some(ranks_per_client=[1] * 9 + [2], coordinator=["colocated"] * 9 + ["dedicated"]),
        "evaluation": some(every=[1, 2], clients=[0, 2], batch_size=[1, 500]),
        "checkpoint": some(every=[1, 5], keep=[1]),
        "algorithm": st.sampled_from(own(Algorithm)),
        "transport": some(up=[*own(Codec), None], down=[None, None, *own(Codec)]),
        "clock": st.sampled_from([{}, {}, {"speed": "LogNormalSpeed"}, {"deadline_s": 1e-3}]),
        "attacks": st.sampled_from(["NoAttack"] * 6 + own(Attack)),
        "aggregation": st.fixed_dictionaries(
            {"name": st.sampled_from(["Mean"] * 6 + own(Aggregation))},
            optional={
                "clip_norm": st.sampled_from([0.1]),
                "on_invalid_update": st.sampled_from(["stop", "skip", "clip"]),
            },
        ),
        "seed": st.integers(0, 3),
    }
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(CONFIGS)
def test_any_settings_train_two_rounds_or_are_refused_in_one_line(drawn: dict[str, Any]) -> None:
    fixed = {"rounds": 2, "tracking": {"trackers": [], "progress": False}}
    tiny = {"data": {"clients": 6, "workers": 0, "examples": 90, "holdout": 0.2, **drawn["data"]}}
    local = {"local": {"lr": 0.01, "steps": 1, **drawn["local"]}}
    cohort = {"cohort": {"size": 2, **drawn["cohort"]}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.yaml"
        path.write_text(yaml.safe_dump({**drawn, **fixed, **tiny, **local, **cohort}))
        try:
            config = load_config(str(path))
            path.write_text(to_yaml(config))
            assert load_config(str(path)) == config
            result = Federation(config, output=folder).run()
        except (ConfigError, InvalidUpdateError) as error:
            event(type(error).__name__)
            assert str(error)  # noqa: PT017 - the other branch is as good
            assert "\n" not in str(error)  # noqa: PT017
            return
        event("trained")
        rows = read_rows(result.folder / "history.jsonl")
        assert [row["round"] for row in rows] == [1, 2]
        numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
        assert all(math.isfinite(value) for value in numbers)
