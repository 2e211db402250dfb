"""`fedddp eval`, `report` and `plan` of centres: names, clients' own models, the matrix across them."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from fedddp import (
    CheckpointConfig,
    CohortConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    Federation,
    LocalConfig,
    ModelConfig,
    TrackingConfig,
    load_model,
)
from fedddp.algorithms import FedPer
from fedddp.cli import main
from fedddp.commands.run_info import find_runs, read_run_info
from fedddp.commands.use_cross_site import cross_site_tables
from fedddp.config.baselines import Baseline
from fedddp.data.partition import Natural
from fedddp.reporting.cross_site_file import CrossSite, parse_cross_site
from fedddp.reporting.dry_run import dry_run
from fedddp.reporting.report import report
from fedddp.reporting.runs import read_run
from fedddp.reporting.sections import participation
from fedddp.storage.history import Metric, judged_by, read_rows
from fedddp.tracking.status import Status
from fedddp.tracking.summary import summary


class Sites(Dataset[tuple[Tensor, int]]):
    """Images of three sites, of which the test set lacks one."""

    classes = ("x", "y", "z")

    def __init__(self, train: bool) -> None:
        draw = torch.Generator().manual_seed(int(train))
        self.ids = ["north", "south", "east"] * 6 if train else ["east", "north", "east", "north", "east"]
        self.targets = torch.randint(3, (len(self.ids),), generator=draw).tolist()
        self.images = torch.randint(200, (len(self.ids), 1, 8, 8), generator=draw, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


def sites(root: str, train: bool) -> Dataset[Any]:
    return Sites(train)


BASE = Config(
    data=DataConfig(dataset=f"{__name__}.sites", clients=3, partition=Natural()),
    model=ModelConfig(name="2nn"),
    local=LocalConfig(epochs=2, batch_size=4, lr=0.2),
    cohort=CohortConfig(size=2),
    evaluation=EvaluationConfig(clients=3),
    tracking=TrackingConfig(trackers=[], progress=False),
    rounds=2,
)
CHANGES: dict[str, dict[str, Any]] = {
    "local": {"baseline": "local"},
    "pooled": {"baseline": "pooled"},
    "FedPer": {"algorithm": FedPer(), "cohort": CohortConfig(size=3)},
    "best": {"checkpoint": CheckpointConfig(best=["eval/accuracy", "eval/loss"])},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    output = str(tmp_path_factory.mktemp("runs"))
    return {
        name: Federation(dataclasses.replace(BASE, output=output, name=name, **changes)).run().folder
        for name, changes in CHANGES.items()
    }


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[object, str]:
    """Return the exit code of `fedddp WORDS`, and what it prints, on standard error where it fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    return stop.value.code, printed.out if stop.value.code == 0 else printed.err


def evaluated(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Any:
    code, text = call(capsys, "eval", *words, "--json", "-")
    assert code == 0, text
    return json.loads(text)


# ---- eval ----


@pytest.mark.parametrize("name", CHANGES)
def test_each_centre_is_evaluated_on_its_own_test_data_as_the_run_did(
    name: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, folders[name])
    last = [row for row in read_rows(folders[name] / "clients.jsonl") if row["round"] == 2]
    assert [(row["name"], row["examples"]) for row in last] == [("east", 3), ("north", 2)]
    for row, expected in zip(found["clients"]["rows"], last, strict=True):
        known = {n: v for n, v in expected.items() if n != "round"}
        assert row == pytest.approx(known, abs=1e-5)
    alone = name in ("local", "FedPer")
    assert (found["clients"]["data"], found["clients"]["personalized"]) == ("test", alone)
    assert bool(found["metrics"]) is not alone
    code, text = call(capsys, "eval", folders[name])
    assert code == 0
    lines = [line.split() for line in text.splitlines()]
    assert sorted(words[0] for words in lines if words[:1] in (["east"], ["north"])) == ["east", "north"]
    assert "on its own part of the test data each" in " ".join(text.split())
    assert ("none: each client has a model of its own" in text) is alone


@pytest.mark.parametrize(
    "words",
    ["eval {} --clients 0", "predict {} a.png", "export {} --format safetensors"],
)
def test_a_model_of_all_is_refused_where_there_is_none(
    words: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("a.png").touch()
    for name, what in (("local", "baseline=local"), ("FedPer", "algorithm=FedPer")):
        code, text = call(capsys, *shlex.split(words.format(folders[name])))
        assert (code, text.count("\n")) == (2, 1)
        assert f"with {what} there is no global model, each client has its own" in text
        if "--clients" not in words:
            assert "choose one with --client (in Python client=): east, north, south (or 0..2)" in text


def test_the_card_of_a_pooled_run_does_not_claim_a_federation(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = call(capsys, "card", folders["pooled"])
    assert code == 0
    assert "trained on the data of 3 clients in one place, in 2 rounds" in text
    assert "| cohort | none: all data in one place |" in text


def constants() -> tuple[float, dict[str, float]]:
    """Return the accuracy of the best single class on the test data, and on those of each client."""
    test = Sites(False)
    owned = {who: [t for t, o in zip(test.targets, test.ids, strict=True) if o == who] for who in test.ids}
    best = {who: max(map(targets.count, range(3))) / len(targets) for who, targets in owned.items()}
    return max(map(test.targets.count, range(3))) / len(test), best


def test_the_card_names_the_clients_and_has_a_row_for_each(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = call(capsys, "card", folders["best"])
    assert code == 0
    assert "| clients | 3: east, north, south |" in text
    assert "| test examples | 5 |" in text
    assert "On the part of the test data that belongs to each of 2 clients, accuracy over clients:" in text
    last = [row for row in read_rows(folders["best"] / "clients.jsonl") if row["round"] == 2]
    of_all, own = constants()
    for row in last:
        numbers = f"{100 * row['accuracy']:.2f} % | {100 * own[row['name']]:.2f} %"
        assert f"| {row['name']} | {row['examples']} | {numbers} |" in text
    words = "The best constant prediction (one class for every image) scores"
    assert f"{words} {100 * of_all:.2f} % in test accuracy." in text


def test_the_page_names_clients_and_what_a_constant_prediction_scores(folders: dict[str, Path]) -> None:
    of_all, own = constants()
    assert own["east"] != own["north"]
    mean = sum(own.values()) / 2
    for name, words in (
        ("best", f"{100 * of_all:.2f} % in test accuracy."),
        ("local", f"{100 * mean:.2f} % in mean accuracy of clients."),
    ):
        page = report([read_run(folders[name])])
        assert page.count(f"scores {words}") == 1
        split, took_part = page.split("Who holds which classes")[1].split("<h2>Participation")
        assert ">south<" in split
        assert took_part.split("<h2>")[0].count(">south<") == 2
    pooled = participation([read_run(folders["pooled"])])
    assert (pooled.blocks, pooled.missing) == ([], ""), "a page leaves this section out"


def test_a_run_is_shown_with_the_names_of_its_clients(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = call(capsys, "show", folders["best"])[1].splitlines()
    assert "east (6), north (6), south (6)" in next(line for line in lines if line.startswith("clients"))
    assert any(line.split()[:1] == ["accuracy"] for line in lines)


def test_runs_side_by_side_are_judged_as_the_page_judges_them(folders: dict[str, Path]) -> None:
    found = find_runs(folders["best"].parent)
    assert {run.score.name for run in found if run.score} == {"clients/accuracy_mean"}
    assert read_run_info(folders["best"]).judged is None


# ---- across sites ----


def test_the_matrix_is_printed_and_written(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("local", "FedPer"):
        code, text = call(capsys, "eval", folders[name], "--cross-site")
        assert code == 0, text
        title, _, header, *rows = text.splitlines()
        assert title == "accuracy in %, after round 2; model of the row, data of the column"
        content = json.loads((folders[name] / "cross-site.json").read_text())
        assert header.split() == ["model", "\\", "data", "east", "north"]
        assert content["global"] is None
        rows_of = zip(["east", "north"], content["matrix"], strict=True)
        expected = [[who, *(f"{100 * v:.1f}" for v in row)] for who, row in rows_of]
        assert [row.split() for row in rows[:-1]] == expected
        assert rows[-1] == str(folders[name] / "cross-site.json")
        last = [row for row in read_rows(folders[name] / "clients.jsonl") if row["round"] == 2]
        own = [row["accuracy"] for row in last]
        assert np.diag(content["matrix"]).tolist() == pytest.approx(own, abs=1e-6)


def test_the_matrix_of_another_metric_is_printed_as_json(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, folders["local"], "--cross-site", "--metric", "eval/loss")
    assert (found["run"], found["metric"]) == (str(folders["local"]), "loss")
    last = [row for row in read_rows(folders["local"] / "clients.jsonl") if row["round"] == 2]
    assert np.diag(found["matrix"]).tolist() == pytest.approx([row["loss"] for row in last], abs=1e-5)
    kept = json.loads((folders["local"] / "cross-site.json").read_text())
    assert (kept["metric"], [*kept["others"]]) == ("accuracy", ["loss"]), (
        "the report's matrix is not replaced"
    )
    assert [*found["others"]] == ["accuracy"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--metric loss", "--metric=loss is of a matrix; give --cross-site too"),
        ("--cross-site --clients 2", "--cross-site takes all clients and the final model"),
        ("--cross-site --best", "--cross-site takes all clients and the final model"),
        ("--cross-site --metric iou", "metric=iou is not measured; give one of loss, accuracy"),
    ],
)
def test_options_of_the_matrix_that_cannot_be(
    words: str, message: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = call(capsys, "eval", folders["FedPer"], *words.split())
    assert (code, text.count("\n")) == (2, 1)
    assert text.startswith(f"error: {message}")


def shown(found: CrossSite) -> list[str]:
    console = Console(width=80, no_color=True)
    with console.capture() as capture:
        for part in cross_site_tables(found):
            console.print(part)
    return capture.get().splitlines()


def test_columns_have_numbers_where_names_do_not_fit() -> None:
    names = tuple(f"hospital of the city {n}" for n in range(5))
    lines = shown(CrossSite(3, Metric("eval/dice"), names, np.full((5, 5), 0.25), None))
    assert lines[0].strip() == "Dice, after round 3; model of the row, data of the column"
    assert lines[1].split() == ["model", "\\", "data", "0", "1", "2", "3", "4"]
    assert lines[2].split() == ["0", "hospital", "of", "the", "city", "0", *["0.250"] * 5]


def test_a_large_matrix_has_a_row_of_means_for_each_client() -> None:
    matrix = np.random.default_rng(1).random((30, 30))
    matrix[4, 7] = np.nan
    row = np.linspace(0, 1, 30)
    lines = shown(CrossSite(3, Metric("eval/accuracy"), tuple(f"c{n}" for n in range(30)), matrix, row))
    assert max(map(len, lines)) <= 80
    assert len(lines) == 32
    for client, line in enumerate(lines[2:]):
        elsewhere = [v for k, v in enumerate(matrix[client]) if k != client and not np.isnan(v)]
        others = [v for k, v in enumerate(matrix[:, client]) if k != client and not np.isnan(v)]
        means = (matrix[client, client], sum(elsewhere) / len(elsewhere), sum(others) / len(others))
        assert line.split() == [f"c{client}", *(f"{100 * v:.1f}" for v in (*means, row[client]))]


# ---- one client's own model ----


def test_a_client_s_own_model_is_evaluated_predicted_with_and_exported(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(capsys, "eval", folders["FedPer"], "--cross-site")
    matrix = json.loads((folders["FedPer"] / "cross-site.json").read_text())["matrix"]
    for row, (name, number) in zip(matrix, (("east", 0), ("north", 1)), strict=True):
        found = evaluated(capsys, folders["FedPer"], "--client", name)
        assert found["client"] == name
        assert [one["accuracy"] for one in found["clients"]["rows"]] == pytest.approx(row)
        right = sum(v * one["examples"] for v, one in zip(row, found["clients"]["rows"], strict=True))
        assert found["metrics"]["accuracy"] == pytest.approx(right / 5), "all five test images"
        (recorded,) = (
            row
            for row in read_rows(folders["FedPer"] / "clients.jsonl")
            if (row["round"], row["client"]) == (2, number)
        )
        own_row = {**found["own_examples"]["row"], "round": 2}
        assert own_row == pytest.approx(recorded, abs=1e-5), "as the run measured it on its own test images"
        assert found["own_examples"]["data"] == "test"
        states = load_file(folders["FedPer"] / "checkpoints" / "round-00002" / "clients-00000.safetensors")
        head = states[f"{number}.layers"]
        output = tmp_path / f"{name}.safetensors"
        assert call(capsys, "export", folders["FedPer"], "--client", name, "--output", output)[0] == 0
        own = load_model(folders["FedPer"], client=number).module.state_dict()
        assert torch.equal(torch.cat([tensor.flatten() for tensor in own.values()])[-len(head) :], head)
        exported = load_file(output)
        assert all(torch.equal(exported[key], tensor) for key, tensor in own.items())
    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    probabilities = []
    for client in ("east", "2"):
        words = ("predict", folders["FedPer"], tmp_path / "a.png", "--client", client, "--json", "-")
        probabilities.append(json.loads(call(capsys, *words)[1])["predictions"])
    assert probabilities[0] != probabilities[1]
    text = call(capsys, "eval", folders["FedPer"], "--client", "east")[1]
    assert "(client east, final, round 2)" in " ".join(text.split())
    own_line, of_all = text.index("own test images of east"), text.index("test images of all ")
    assert text.index("data  ") < own_line < of_all
    assert f"accuracy {100 * matrix[0][0]:.2f} %" in text[own_line:of_all]
    assert "central" not in text
    text = call(capsys, "eval", folders["FedPer"], "--client", "south", "--clients", "0")[1]
    assert "own test images of south none" in " ".join(text.split())


@pytest.mark.parametrize(
    ("name", "client", "message"),
    [
        ("FedPer", "west", "client=west is none of the run's; choose one: east, north, south (or 0..2)"),
        ("FedPer", "3", "client=3 is none of the run's; choose one"),
        ("best", "east", "with algorithm=FedAvg clients have no models of their own; leave client out"),
        ("pooled", "0", "with baseline=pooled clients have no models of their own; leave client out"),
    ],
)
def test_a_client_without_a_model_is_refused_in_one_line(
    name: str, client: str, message: str, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("export", folders[name], "--format", "safetensors", "--client", client)
    code, text = call(capsys, *words)
    assert (code, text.count("\n")) == (2, 1)
    assert message in text


def test_the_card_of_a_run_without_a_global_model_says_so(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, trained in (("local", "by each of 3 clients alone"), ("FedPer", "with FedPer on 3 clients")):
        code, text = call(capsys, "card", folders[name])
        assert code == 0
        assert f"trained {trained} in 2 rounds" in text
        assert "there is no global model: each client has its own" in text
        assert 'client="east")' in text


# ---- the best by a metric ----


def test_the_best_model_by_each_metric_is_loaded(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_rows(folders["best"] / "history.jsonl")
    for metric, best in (("eval/accuracy", max), ("eval/loss", min)):
        value = best(row[metric] for row in rows)
        assert load_model(folders["best"], best=metric).metadata["metric"] == metric
        for words in (["--best", metric], [f"--best={metric}"]):
            found = evaluated(capsys, folders["best"], *words)
            assert found["metrics"][metric.removeprefix("eval/")] == pytest.approx(value, abs=1e-5)
            assert found["best"] == metric
    assert load_model(folders["best"], best=True).metadata["metric"] == "eval/accuracy"
    assert call(capsys, "card", "--best", folders["best"])[0] == 0, "the run is no metric"
    code, text = call(capsys, "card", folders["best"], "--best", "eval/loss")
    assert code == 0
    assert "the best model by eval/loss" in text


def test_a_metric_without_a_best_model_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(
        ConfigError, match=r"no best model by eval/dice; give one of eval/accuracy, eval/loss"
    ):
        load_model(folders["best"], best="eval/dice")
    with pytest.raises(ConfigError, match=r"has no best.safetensors"):
        load_model(folders["pooled"], best="eval/dice")


# ---- what is judged by clients alone ----


def test_a_run_without_a_test_of_a_model_of_all_is_judged_by_the_mean_over_clients(
    folders: dict[str, Path],
) -> None:
    rows = read_rows(folders["local"] / "history.jsonl")
    metric = judged_by(rows)
    assert metric is not None
    assert (metric.key, metric.bare, metric.sign) == ("clients/accuracy_mean", "accuracy", 1)
    assert (metric.title, metric.axis) == ("mean accuracy of clients", "mean accuracy of clients in %")
    loss = Metric("clients/loss_mean")
    assert (loss.sign, loss.in_percent) == (-1, False)
    info = read_run_info(folders["local"])
    assert info.score is not None
    value = rows[-1]["clients/accuracy_mean"]
    assert (info.score.name, info.score.last, info.algorithm) == (metric.key, value, "local only")
    status = Status(2)
    for row in rows:
        status.round(row)
    assert f"mean accuracy of clients {100 * value:.2f} %" in " ".join(p.text for p in status.scores())
    console = Console(width=200)
    with console.capture() as capture:
        console.print(summary(rows, folders["local"], 2, finished=True))
    assert f"mean accuracy of clients  {100 * value:.2f} %" in capture.get()
    assert "--cross-site" in capture.get()
    assert "--client NAME" in capture.get()


def test_a_test_of_all_comes_before_clients_and_a_null_does_not_change_that() -> None:
    status = Status(3)
    rows: list[dict[str, float | None]] = [{"eval/accuracy": 0.5}, {"eval/accuracy": None}, {}]
    for number, row in enumerate(rows, 1):
        status.round({"round": number, "clients/accuracy_mean": 0.25, **row})
    assert [part.text for part in status.scores()] == ["accuracy 50.00 %"]


def test_the_report_has_the_matrix_and_the_names(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    call(capsys, "eval", folders["FedPer"], "--cross-site")
    page = report([read_run(folders["FedPer"])])
    assert "Accuracy of each client's model on the data of each" in page.replace("&#x27;", "'")
    section = page[page.index("Across clients") :]
    content = json.loads((folders["FedPer"] / "cross-site.json").read_text())
    assert f">{100 * content['matrix'][0][1]:.0f}<" in section
    clients = page[page.index("Accuracy of each client") : page.index("Across clients")]
    assert ">north<" in clients
    assert ">global<" not in section


def test_local_runs_beside_others_are_judged_by_clients_on_the_page(folders: dict[str, Path]) -> None:
    runs = [read_run(folders[name]) for name in ("local", "pooled")]
    page = report(runs)
    summary_of = page[page.index("Summary") : page.index("Learning")]
    for run, name in zip(runs, ("local only", "pooled"), strict=True):
        assert f">{name}<" in summary_of
        assert f"{100 * run.rows[-1]['clients/accuracy_mean']:.2f} %" in summary_of
    assert "mean accuracy of clients" in summary_of


def test_a_corrupt_matrix_is_named(tmp_path: Path) -> None:
    content = {"round": 1, "metric": "iou", "names": ["a", "b"], "matrix": [[1, None]], "global": None}
    with pytest.raises(ValueError, match="not of its 2 names"):
        parse_cross_site(tmp_path, content)
    square = parse_cross_site(tmp_path, {**content, "matrix": [[1, None], [0, 1]]})
    assert np.isnan(square.matrix[0, 1])


# ---- plan ----


@pytest.mark.parametrize(
    ("baseline", "population", "first"),
    [
        ("local", "3 clients of 6 to 6", "clients per group 3, examples per group 18"),
        ("pooled", "1 client of 18 examples", "clients per group 1, examples per group 18"),
    ],
)
def test_the_plan_of_a_baseline_is_what_it_trains(baseline: Baseline, population: str, first: str) -> None:
    table = dry_run(dataclasses.replace(BASE, baseline=baseline), 1)
    rows = dict(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert str(rows["population"]).startswith(population)
    assert rows["first round"] == first
