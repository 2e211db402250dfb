"""`fedddp compare --baselines`: what is trained beside a federation, its budget, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedddp.cli import main
from fedddp.comparison import _budgeted, prepare
from fedddp.reporting.curves import read_all
from fedddp.reporting.labels import distinguish
from fedddp.reporting.tables import cells, paper_cells
from fedddp.section import ConfigError

SMALL: dict[str, Any] = {
    "data": {"dataset": "digits", "examples": 150, "clients": 4, "holdout": 0.2},
    "model": {"name": "2nn"},
    "cohort": {"size": 2},
    "local": {"epochs": 1, "batch_size": 10, "lr": 0.1},
    "tracking": {"trackers": [], "progress": False},
    "rounds": 2,
}


def write(name: str = "small.yaml", **changes: Any) -> str:
    Path(name).write_text(yaml.safe_dump({**SMALL, **changes}))
    return name


def compare(*words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *words])
    assert stop.value.code == 0


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_the_table_has_a_federation_beside_both_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    write()
    compare("small.yaml", "--baselines")
    folder = Path("runs/small")
    histories = {name: rows_of(folder / name) for name in ("small", "local-only", "pooled")}
    table = (folder / "comparison.md").read_text().splitlines()
    header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table if "|" in line)
    assert header[:4] == ["run", "mean accuracy of clients", "accuracy", "rounds"]
    assert [line[0] for line in lines] == ["small", "local only", "pooled"]
    for line, (name, rows) in zip(lines, histories.items(), strict=True):
        assert line[1] == f"{100 * rows[-1]['clients/accuracy_mean']:.2f} %"
        tested = "–" if name == "local-only" else f"{100 * rows[-1]['eval/accuracy']:.2f} %"
        assert line[2] == tested
        assert json.loads((folder / name / "clients.jsonl").read_text().splitlines()[0])["round"] == 1
    # Half of the clients take part, so that a round of all of them is worth two.
    assert [len(rows) for rows in histories.values()] == [2, 1, 1]
    examples = [sum(row["train/examples"] for row in rows) for rows in histories.values()]
    assert examples[1] == examples[2]
    page = (folder / "comparison.html").read_text()
    assert "mean accuracy of clients" in page
    assert ">local only<" in page
    printed = capsys.readouterr().out
    assert "to" in printed
    assert "mean accuracy of clients" in " ".join(printed.split())
    paper = paper_cells(read_all(folder / name for name in histories), 0.1)
    assert paper[0][:5] == ["", "seeds", "mean accuracy of clients in %", "best in %", "accuracy in %"]


@pytest.mark.parametrize(("cohort", "factor"), [(4, 1.0), (2, 0.5), (1, 0.25)])
def test_baselines_train_on_as_many_examples_as_the_federation(cohort: int, factor: float) -> None:
    write(cohort={"size": cohort}, rounds=12, evaluation={"every": 4})
    comparison = prepare(["small.yaml"], [], baselines=True)
    assert [*comparison.configs] == ["small", "local-only", "pooled"]
    for name, config in _budgeted(comparison.configs):
        own = 1.0 if name == "small" else factor
        assert (config.rounds, config.evaluation.every) == (12 * own, 4 * own)
        assert config.evaluation.clients == 4
        assert config.baseline == {"small": "none", "local-only": "local"}.get(name, name)


def test_data_of_other_tasks_have_a_budget_too() -> None:
    data = {"dataset": "scenes", "examples": 60, "clients": 4, "holdout": 0.2, "partition": {"name": "IID"}}
    write(data=data, model={"name": "unet"}, task={"name": "Segmentation"}, rounds=4)
    budgets = _budgeted(prepare(["small.yaml"], [], baselines=True).configs)
    assert {name: config.rounds for name, config in budgets} == {"small": 4, "local-only": 2, "pooled": 2}


def test_baselines_are_of_the_first_run_and_of_each_seed() -> None:
    write(
        seeds=[3, 5],
        evaluation={"clients": 2},
        compare={"A": {"local": {"lr": 0.3}}, "B": {"algorithm": {"name": "FedProx", "mu": 0.1}}},
    )
    comparison = prepare(["small.yaml"], [], baselines=True)
    baselines = {n: c for n, c in comparison.configs.items() if c.baseline != "none"}
    assert [*baselines] == [f"{kind}-seed={seed}" for seed in (3, 5) for kind in ("local-only", "pooled")]
    assert [config.seed for config in baselines.values()] == [3, 3, 5, 5]
    assert {config.local.lr for config in baselines.values()} == {0.3}
    assert {config.evaluation.clients for config in comparison.configs.values()} == {2}


def test_several_targets_have_the_baselines_of_the_first() -> None:
    write("one.yaml", local={"lr": 0.5})
    write("two.yaml", local={"lr": 0.25})
    comparison = prepare(["one.yaml", "two.yaml"], [], baselines=True)
    lrs = {name: config.local.lr for name, config in comparison.configs.items()}
    assert lrs == {"one": 0.5, "two": 0.25, "local-only": 0.5, "pooled": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"dataset": "digits", "clients": 4}}, "data.holdout"),
        ({"algorithm": {"name": "FedBuff"}}, "--baselines of small: .*FedBuff is asynchronous"),
        ({"baseline": "pooled"}, "--baselines: small has baseline=pooled; leave one of them out"),
        ({"compare": {"pooled": {}}}, "there is a run pooled already; give it another name"),
    ],
)
def test_what_has_no_baselines_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    write(**changes)
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(["small.yaml"], [], baselines=True)
    assert "\n" not in str(caught.value)


def finished(name: str, rows: list[dict[str, float]], **settings: Any) -> Path:
    """Write a run directory."""
    folder = Path(name)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    numbered = ({"round": number, **row} for number, row in enumerate(rows, 1))
    (folder / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in numbered))
    (folder / "model.safetensors").touch()
    return folder


def test_finished_runs_alone_have_no_baselines() -> None:
    finished("runs/a", [{"eval/accuracy": 0.5}])
    with pytest.raises(ConfigError, match=r"--baselines are of a run that is trained: give its recipe"):
        prepare(["runs/a"], [], baselines=True)


def test_the_column_of_clients_is_there_where_all_runs_have_it() -> None:
    both = [{"eval/iou": 0.5, "clients/iou_mean": 0.25}, {"eval/iou": 0.75, "clients/iou_mean": 0.375}]
    one, two = finished("a", both), finished("b", [{"eval/iou": 0.5}])
    with_column, without = cells(read_all([one]), 0.5), cells(read_all([one, two]), 0.5)
    assert with_column[0][:4] == ["run", "IoU", "mean IoU of clients", "rounds"]
    assert with_column[1][:3] == ["a", "0.7500", "0.3750"]
    assert without[0][:3] == ["run", "IoU", "rounds"]


def test_seeds_of_a_baseline_are_one_curve_by_its_label() -> None:
    values = {0: 0.25, 1: 0.75}
    folders = [
        finished(
            f"{name}-seed={seed}",
            [{"clients/iou_mean": value, "eval/iou": value}][:1]
            if name == "pooled"
            else [{"clients/iou_mean": value}],
            seed=seed,
            baseline={"local-only": "local"}.get(name, name),
        )
        for name in ("local-only", "pooled")
        for seed, value in values.items()
    ]
    table = cells(read_all(folders), 0.5)
    deviation = float(np.std([25, 75], ddof=1)) / 100
    assert [line[:3] for line in table] == [
        ["run", "mean IoU of clients", "IoU"],
        ["local only", f"0.5000 ± {deviation:.4f}", "–"],
        ["pooled", f"0.5000 ± {deviation:.4f}", f"0.5000 ± {deviation:.4f}"],
    ]


def test_a_run_without_the_mean_over_clients_does_not_fit_one_that_has_nothing_else() -> None:
    alone = finished("alone", [{"clients/accuracy_mean": 0.5}], baseline="local")
    other = finished("other", [{"eval/accuracy": 0.5}])
    with pytest.raises(ValueError, match=r"by eval/accuracy; .*with evaluation.clients"):
        read_all([alone, other])


def test_a_baseline_is_named_as_such() -> None:
    runs = [
        {"algorithm": "FedProx", "baseline": "none"},
        {"algorithm": "FedProx", "baseline": "local"},
        {"algorithm": "FedProx", "baseline": "pooled"},
    ]
    assert distinguish(runs, ["algorithm", "baseline"]) == ["FedProx", "local only", "pooled"]


def test_the_help_names_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    compare("--help")
    assert "--baselines" in capsys.readouterr().out
