"""docs/metrics.md lists what runs log: read back from their files, wandb, TensorBoard and MLflow."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import run_part, sections
from wandb_files import history, last_summary, read_run

from fedddp import Federation, TrackingConfig
from fedddp.config.loader import load_config
from fedddp.storage.history import read_rows
from fedddp.tracking.derived import DerivedMetrics

DOCS = Path(__file__).parent.parent / "docs"
HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None
SMALL = "--data.examples 400 --data.clients 8 --cohort.size 3 --tracking.progress false"
RUNS = {
    "synchronous": (
        "digits",
        f"{SMALL} --rounds 4 --data.holdout 0.3 --evaluation.clients 4 --evaluation.every 2 --cohort.extra 1 "
        "--clock.deadline_s 0.3 --clock.speed.overhead_s 0.2 --checkpoint.every 2 "
        "--checkpoint.best eval/accuracy",
    ),
    "robust": (
        "digits-median",
        f"{SMALL} --rounds 2 --aggregation.clip_norm 0.5 --clock Wall --seed 1",
    ),
    "private": (
        "digits",
        f"{SMALL} --rounds 2 --privacy CentralDP --privacy.delta 1e-3 --privacy.noise_multiplier 1 "
        "--privacy.adaptive true --privacy.count_noise 2",
    ),
    "asynchronous": ("digits-fedbuff", f"{SMALL} --rounds 3"),
    "secure": ("digits-secagg", f"{SMALL} --rounds 2"),
}
WITHOUT_A_CLASS = re.compile(r"^(eval/recall)/\d+$")


@dataclass
class Logged:
    """What a run logged."""

    folder: Path
    rows: list[dict[str, Any]]
    records: list[dict[str, Any]]
    """Of wandb's file."""


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Logged]:
    """Train the runs with all trackers that are installed."""
    output = tmp_path_factory.mktemp("runs")
    trackers = ["wandb", "tensorboard", *(["mlflow"] if HAS_MLFLOW else [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(output)
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(output / "wandb-home"))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", f"file://{output}/mlruns")
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        found = {}
        for name, (recipe, flags) in RUNS.items():
            tracking = TrackingConfig(trackers=trackers, progress=False, report=name == "synchronous")
            config = load_config(recipe, [*flags.split(), "--name", name, "--output", str(output)])
            result = Federation(config, tracking=tracking).run()
            (session,) = result.folder.glob("wandb/offline-run-*")
            rows = read_rows(result.folder / "history.jsonl")
            assert [row["round"] for row in rows] == list(range(1, config.rounds + 1))
            found[name] = Logged(result.folder, rows, read_run(session))
    return found


def listed(section: str) -> dict[str, str]:
    """Return the keys of a section of docs/metrics.md, each with when it appears."""
    table = re.findall(
        r"^\| `([^`]+)` \|([^|]*)\|([^|]+)\| ([^|]+) \|$",
        sections((DOCS / "metrics.md").read_text())[section],
        re.MULTILINE,
    )
    keys = {key: when for key, _, _, when in table}
    assert len(keys) == len(table) > 4
    assert all(meaning.strip() for _, _, meaning, _ in table)
    return keys


def logged_keys(run: Logged) -> tuple[set[str], set[str]]:
    """Return the keys that wandb's file has as numbers, and those that it has as tables, pictures, ..."""
    numbers, media = set(), set()
    for item in history(run.records).values():
        for key, value in item.items():
            if key.startswith("_"):
                continue  # wandb's own
            name, dot, _ = key.partition(".")
            if dot:
                media.add(name.removesuffix("_table"))
            else:
                assert isinstance(value, int | float), key
                numbers.add(WITHOUT_A_CLASS.sub(r"\1/<class>", key))
    return numbers, media


def test_the_page_lists_the_keys_of_the_history_and_no_others(logged: dict[str, Logged]) -> None:
    keys = {key for run in logged.values() for row in run.rows for key in row}
    assert keys == listed("Rows of history.jsonl").keys()


def test_the_page_notes_when_a_key_of_the_history_appears(logged: dict[str, Logged]) -> None:
    for key, when in listed("Rows of history.jsonl").items():
        in_rows = {name: [key in row for row in run.rows] for name, run in logged.items()}
        if when.startswith("always"):
            assert all(all(found) for found in in_rows.values()), key
        if when in ("synchronous", "asynchronous"):
            assert {name for name, found in in_rows.items() if any(found)} == (
                {"asynchronous"} if when == "asynchronous" else {"synchronous", "robust", "private", "secure"}
            ), key
        if when.startswith("after an evaluation"):
            assert in_rows["synchronous"] == [False, True, False, True], key
        if "privacy" in when:
            assert {name for name, found in in_rows.items() if any(found)} == {"private"}, key
        if "secure_aggregation" in when:
            assert {name for name, found in in_rows.items() if any(found)} == (
                {"secure"} if when.startswith("with ") else set(logged) - {"secure"}
            ), key
        if "evaluation.clients" in when:
            assert not any(in_rows["robust"] + in_rows["asynchronous"]), key
    saved = [["time/checkpoint" in row for row in run.rows] for run in logged.values()]
    assert saved[0] == [False, False, True, False], "after the checkpoint of round 2"


def test_the_page_lists_the_numbers_of_wandb_and_no_others(logged: dict[str, Logged]) -> None:
    numbers = {key for run in logged.values() for key in logged_keys(run)[0]}
    rows = [row for run in logged.values() for row in run.rows]
    lists = {key for row in rows for key, value in row.items() if isinstance(value, list)}
    only_trackers = listed("Numbers that only trackers have")
    expected = {key for key, when in only_trackers.items() if when != "on a GPU" or torch.cuda.is_available()}
    assert numbers == expected | (listed("Rows of history.jsonl").keys() - lists)


def test_the_page_lists_the_best_values_of_the_summary(logged: dict[str, Logged]) -> None:
    for run in logged.values():
        summary = last_summary(run.records)
        best = {key: value for key, value in summary.items() if key.startswith("best/")}
        of_clients = {"best/clients/accuracy_mean"}  # none of these runs is judged by it
        assert best.keys() == listed("Summary of a wandb run").keys() - of_clients
        for name, choose in (("accuracy", max), ("accuracy_top5", max), ("loss", min)):
            values = {row["round"]: row[f"eval/{name}"] for row in run.rows if f"eval/{name}" in row}
            assert best[f"best/{name}"] == choose(values.values())
            first = next(number for number, value in values.items() if value == best[f"best/{name}"])
            assert best[f"best/{name}_round"] == first
            assert summary[f"eval/{name}"] == values[max(values)], "the last value has the metric's own name"


def test_the_page_lists_the_tables_and_pictures_of_wandb_and_no_others(logged: dict[str, Logged]) -> None:
    media = {name: logged_keys(run)[1] for name, run in logged.items()}
    artifacts = {
        re.sub(r"-\w+$", "-<run>", record["artifact"]["name"])
        for run in logged.values()
        for record in run.records
        if record.get("artifact", {}).get("type") == "model"
    }
    found = set().union(*media.values()) | artifacts
    assert found == listed("Tables, pictures and files of a wandb run").keys()
    assert media["synchronous"] == {"clients/table", "clients/split", "eval/confusion", "report"}
    assert media["asynchronous"] == {"staleness/histogram", "clients/split", "eval/confusion"}


@pytest.mark.parametrize("file", ["clients.jsonl", "arrivals.jsonl"])
def test_the_page_lists_the_keys_of_the_other_files(logged: dict[str, Logged], file: str) -> None:
    run = logged["synchronous" if file == "clients.jsonl" else "asynchronous"]
    rows = read_rows(run.folder / file)
    assert rows
    for row in rows:
        assert row.keys() == listed(f"Rows of {file}").keys()


# ---- the trackers hold what the files hold ----


def numbers_of(rows: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """Return every number of a history by key and round."""
    return {
        (key, row["round"]): value
        for row in rows
        for key, value in row.items()
        if isinstance(value, int | float) and key != "round"
    }


@pytest.mark.parametrize("name", RUNS)
def test_wandb_has_every_number_of_the_history_at_its_round(logged: dict[str, Logged], name: str) -> None:
    run = logged[name]
    items = history(run.records)
    assert [item["round"] for item in items.values()] == list(items) == [row["round"] for row in run.rows]
    for (key, step), value in numbers_of(run.rows).items():
        assert items[step][key] == value, key
    for row in run.rows:
        for index, recall in enumerate(row.get("eval/recall", [])):
            assert items[row["round"]][f"eval/recall/{index}"] == recall


def test_wandb_draws_every_number_against_the_round(logged: dict[str, Logged]) -> None:
    metrics = [record["metric"] for record in logged["synchronous"].records if "metric" in record]
    assert {m.get("name") or m["glob_name"]: m.get("step_metric") for m in metrics} == {
        "round": None,
        "*": "round",
    }


@pytest.mark.parametrize("name", RUNS)
def test_totals_are_those_of_the_rows(logged: dict[str, Logged], name: str) -> None:
    run = logged[name]
    examples = total_bytes = 0
    seconds = virtual = 0.0
    for row, item in zip(run.rows, history(run.records).values(), strict=True):
        examples += row["train/examples"]
        total_bytes += row["bytes/up"] + row["bytes/down"]
        seconds += row["time/round"] - row.get("time/evaluate", 0) - row.get("time/checkpoint", 0)
        assert (item["total/examples"], item["total/bytes"]) == (examples, total_bytes)
        assert item["total/time"] == pytest.approx(seconds)
        if "time/virtual" in row:
            virtual += row["time/virtual"]
            assert item["total/virtual"] == pytest.approx(virtual)
        assert 0 <= item["system/idle"] <= 1
        assert 50e6 < item["system/memory"] < 50e9
        assert item["system/examples_per_s"] == pytest.approx(row["train/examples"] / row["time/train"])


@pytest.mark.parametrize("name", RUNS)
def test_tensorboard_has_every_number_of_the_history_at_its_round(
    logged: dict[str, Logged], name: str
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = logged[name]
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    found = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    expected = numbers_of(run.rows)
    assert {key: value for key, value in found.items() if key in expected} == pytest.approx(
        expected, rel=1e-6
    )
    derived = {WITHOUT_A_CLASS.sub(r"\1/<class>", tag) for tag, _ in found.keys() - expected.keys()}
    assert derived <= listed("Numbers that only trackers have").keys()
    assert set(events.Tags()["images"]) == {"clients/split", "eval/confusion"}


@pytest.mark.skipif(not HAS_MLFLOW, reason="needs mlflow or mlflow-skinny")
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_every_number_of_the_history_at_its_round(logged: dict[str, Logged], name: str) -> None:
    run = logged[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        tracking = importlib.import_module("mlflow.tracking")
        client: Any = tracking.MlflowClient(f"file://{run.folder.parent}/mlruns")
        experiment = client.get_experiment_by_name("fedddp")
        (stored,) = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        found = {
            (key, point.step): point.value
            for key in stored.data.metrics
            for point in client.get_metric_history(stored.info.run_id, key)
        }
    assert (run.folder / ".mlflow-run").read_text() == stored.info.run_id
    assert stored.info.status == "FINISHED"
    assert stored.data.params["algorithm.name"] == {"asynchronous": "FedBuff"}.get(name, "FedAvg")
    expected = numbers_of(run.rows)
    assert {key: value for key, value in found.items() if key in expected} == expected


# ---- the end of a run ----


def wandb_table(run: Logged, key: str) -> dict[str, Any]:
    """Return the table that wandb has under `key` in the last round."""
    item = history(run.records)[run.rows[-1]["round"]]
    (session,) = run.folder.glob("wandb/offline-run-*")
    content: dict[str, Any] = json.loads((session / "files" / item[f"{key}.path"]).read_text())
    return content


def test_wandb_has_the_clients_of_the_last_evaluation_as_a_table(logged: dict[str, Logged]) -> None:
    run = logged["synchronous"]
    table = wandb_table(run, "clients/table")
    rows = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
    assert rows == [row for row in read_rows(run.folder / "clients.jsonl") if row["round"] == 4]
    assert len(rows) == 4


@pytest.mark.parametrize("name", RUNS)
def test_wandb_has_the_confusion_matrix_of_the_final_model(logged: dict[str, Logged], name: str) -> None:
    run = logged[name]
    table = wandb_table(run, "eval/confusion_table")
    assert table["columns"] == ["Actual", "Predicted", "nPredictions"]
    counts = {(true, predicted): count for true, predicted, count in table["data"]}
    for label, recall in enumerate(run.rows[-1]["eval/recall"]):
        of_class = {predicted: n for (true, predicted), n in counts.items() if true == str(label)}
        assert of_class[str(label)] / sum(of_class.values()) == pytest.approx(recall)


def test_wandb_has_the_best_and_the_final_model_as_versions_of_one_artifact(
    logged: dict[str, Logged],
) -> None:
    run = logged["synchronous"]
    artifacts = [r["artifact"] for r in run.records if r.get("artifact", {}).get("type") == "model"]
    best, final = artifacts
    assert best["name"] == final["name"]
    assert [set(a["aliases"]) for a in artifacts] == [{"latest", "best"}, {"latest", "final"}]
    files = [artifact["manifest"]["contents"] for artifact in artifacts]
    assert [[(file["path"], file["local_path"]) for file in contents] for contents in files] == [
        [("model.safetensors", str(run.folder / "best.safetensors"))],
        [("model.safetensors", str(run.folder / "model.safetensors"))],
    ]
    metadata = json.loads(final["metadata"])
    assert (metadata["algorithm"], metadata["data"], metadata["task"]) == (
        "FedAvg",
        "digits",
        "Classification",
    )
    assert metadata["round"] == 4
    assert metadata["eval/accuracy"] == run.rows[-1]["eval/accuracy"]
    assert re.fullmatch(r"[0-9a-f]{16}", metadata["config_digest"])
    assert json.loads(best["metadata"])["metric"] == "eval/accuracy"


def test_the_report_is_part_of_the_wandb_run(logged: dict[str, Logged]) -> None:
    run = logged["synchronous"]
    item = history(run.records)[4]
    (session,) = run.folder.glob("wandb/offline-run-*")
    assert (session / "files" / item["report.path"]).read_text() == (run.folder / "report.html").read_text()
    assert not (logged["robust"].folder / "report.html").exists(), "only where it is asked for"


# ---- derived numbers ----


def test_derived_numbers_by_hand() -> None:
    row = {
        "round": 1,
        "train/examples": 300,
        "bytes/up": 10,
        "bytes/down": 30,
        "time/round": 10.0,
        "time/train": 3.0,
        "time/evaluate": 4.0,
        "time/checkpoint": 1.0,
        "time/idle": [2.0, 1.0],
        "eval/loss": 2.0,
        "eval/accuracy": 0.25,
        "eval/recall": [0.5, None],
        "cohort": [4, 5],
    }
    derived = DerivedMetrics()
    found = derived.numbers(row)
    assert found.pop("system/memory") > 0
    found.pop("system/gpu_memory", None)
    assert found == {
        **{key: value for key, value in row.items() if isinstance(value, int | float) and key != "round"},
        "eval/recall/0": 0.5,
        "total/examples": 300,
        "total/bytes": 40,
        "total/time": 5.0,
        "system/idle": 0.3,  # 1.5 of 5 seconds
        "system/examples_per_s": 100.0,
    }
    again = derived.numbers(
        {"round": 2, "eval/loss": 1.0, "eval/accuracy": 0.125, "train/loss": float("nan")}
    )
    assert (again["total/examples"], "train/loss" in again, "eval/recall/0" in again) == (300, False, False)
    assert derived.best == {
        **{"best/loss": 1.0, "best/loss_round": 2},
        **{"best/accuracy": 0.25, "best/accuracy_round": 1},
    }


def test_many_classes_become_no_numbers_of_their_own() -> None:
    assert "eval/recall/19" in DerivedMetrics().numbers({"round": 1, "eval/recall": [0.5] * 20})
    assert "eval/recall/0" not in DerivedMetrics().numbers({"round": 1, "eval/recall": [0.5] * 21})


def test_a_resumed_run_continues_totals_and_best_values(logged: dict[str, Logged]) -> None:
    rows = logged["synchronous"].rows
    straight, resumed = DerivedMetrics(), DerivedMetrics(rows[:2])
    for row in rows[:2]:
        straight.numbers(row)
    for row in rows[2:]:
        expected, found = straight.numbers(row), resumed.numbers(row)
        keys = [key for key in expected if not key.startswith("system/")]
        assert {key: found[key] for key in keys} == pytest.approx({key: expected[key] for key in keys})
    assert resumed.best == straight.best


# ---- the page about trackers ----


@pytest.mark.usefixtures("no_dashboards")
def test_the_page_about_tracking_runs_as_it_stands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (DOCS / "tracking.md").read_text()
    run_part(page, capsys, ("wandb", "tensorboard"))
    rows = read_rows(Path("runs/tracked/history.jsonl"))
    lines = Path("tracked.csv").read_text().splitlines()
    assert len(lines) == len(rows) + 1
    position = lines[0].split(",").index("eval/accuracy")
    assert [float(line.split(",")[position]) for line in lines[1:]] == [r["eval/accuracy"] for r in rows]
    assert list(Path("runs/board/tensorboard").glob("events*"))
    (with_pandas,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert 'pandas.read_json("runs/tracked/history.jsonl", lines=True)' in with_pandas
    if importlib.util.find_spec("pandas"):
        exec(with_pandas, {})
        assert f"{rows[-1]['eval/accuracy']:.4f}"[:5] in capsys.readouterr().out


def test_the_page_about_tracking_shows_the_sweep_that_is_tested() -> None:
    import yaml

    shown = re.findall(r"^```yaml\n(.*?)^```$", (DOCS / "tracking.md").read_text(), re.MULTILINE | re.DOTALL)
    assert [yaml.safe_load(text) for text in shown] == [yaml.safe_load((DOCS / "sweep.yaml").read_text())]
