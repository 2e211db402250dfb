"""A model card in Markdown: what the run directory records of a model, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedddp.config.files import OBJECTS
from fedddp.config.loader import dump_yaml
from fedddp.data.catalog import TORCHVISION
from fedddp.inference.card_clients import client_data, named_clients
from fedddp.inference.card_tasks import (
    KNOWS,
    PIPELINES,
    PREDICTS,
    PURPOSES,
    class_text,
    lowest,
    personal,
    sees,
)
from fedddp.inference.card_text import choice, escaped, markdown_table, numbers, read_part, some_names
from fedddp.inference.loading import client_names, model_file, read_weights
from fedddp.privacy.statement import statement
from fedddp.section import ConfigError, local_path
from fedddp.storage.client_rows import client_table
from fedddp.storage.examined import constant_line
from fedddp.storage.history import (
    HISTORY,
    SPREAD,
    Metric,
    Row,
    capital,
    class_metric,
    flat,
    is_client_score,
    judged_by,
    number,
    read_config,
    read_rows,
)
from fedddp.storage.judged import averages_note, best_of
from fedddp.storage.run_record import ALONE, EVALUATION, SPLIT, RunRecord, read_record, read_warnings

MOST_CLASSES, MOST_WARNINGS = 50, 5
"""Rows of a table, and warnings that are quoted."""

EDITED = ("name", "output", "resume", "replay", "tracking", "topology", "checkpoint")
"""Sections that decide nothing that a card is about."""


def model_card(run: str | Path, best: bool | str = False) -> str:
    """Return the card of the final (or best) model of a finished run, with the front matter of Hugging Face.

    Raises:
        ConfigError: the run is not finished, or one of its files is corrupt.
    """
    card = _Card(local_path(str(run), "run"), best)
    parts = (
        card.front_matter(),
        card.summary(),
        ("## Model", *card.model()),
        ("## Data", *card.data()),
        ("## Training", *card.training()),
        ("## Results", *card.results()),
        ("## Limits", *card.limits()),
        ("## Use", *card.use()),
        ("## Origin", *card.origin()),
    )
    return "\n\n".join(block for part in parts for block in part) + "\n"


class _Card:
    """The files of a run, and the parts of its card; each part yields its blocks of Markdown."""

    def __init__(self, directory: Path, best: bool | str) -> None:
        self.directory, self.best = directory, best
        self.file = model_file(directory, best)
        weights, self.header = read_weights(self.file)
        self.parameters = sum(tensor.numel() for tensor in weights.values() if tensor.is_floating_point())
        try:
            self.classes: list[str] = json.loads(self.header["classes"])
            self.preprocessing: Row = json.loads(self.header["preprocessing"])
            self.config = read_config(directory / "config.yaml")
            self.rows = read_rows(directory / HISTORY)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{directory}: the card needs all files of the run ({error})") from None
        self.record: RunRecord | None = read_record(directory)
        self.split = read_part(directory / SPLIT)
        examination = read_part(directory / EVALUATION)
        self.constant = constant_line(self.target, examination.get("constant") or {})
        self.examination = {} if best else examination
        self.settings = flat(self.config)
        last = self.rows[-1]["round"] if self.rows else 0
        self.round = int(self.header.get("round", last)) if best else last
        self.row: Row = next((row for row in self.rows if row["round"] == self.round), {})

    @property
    def dataset(self) -> str:
        """The name of the dataset, or the class of the user's own."""
        objects = self.config.get(OBJECTS, {})
        return str(objects["train"]["class"] if "train" in objects else self.settings["data.dataset"])

    @property
    def network(self) -> str:
        """The name of the network, or the class of the user's own."""
        objects = self.config.get(OBJECTS, {})
        return str(objects["module"]["class"] if "module" in objects else self.settings["model.name"])

    @property
    def algorithm(self) -> str:
        """The name of the algorithm."""
        return str(self.settings["algorithm.name"])

    def metrics(self) -> dict[str, float]:
        """Return the metrics on the test data that are one number."""
        found = {name: value for name, value in self.row.items() if name.startswith("eval/")}
        return {n.removeprefix("eval/"): v for n, v in found.items() if isinstance(v, int | float)}

    @property
    def pooled(self) -> bool:
        """Whether the run trained on the data of all in one place."""
        return self.header.get("baseline") == "pooled"

    @property
    def target(self) -> str:
        """What the task predicts: class, multilabel, mask or boxes."""
        target = self.header.get("target", "class")
        return target if target in PURPOSES else "class"

    def per_class(self) -> dict[Metric, list[float | None]]:
        """Return the metrics of every class that were recorded."""
        return {
            class_metric(key): values
            for key, values in self.row.items()
            if key.startswith("eval/") and isinstance(values, list) and len(values) == len(self.classes)
        }

    # ---- the parts ----

    def front_matter(self) -> Iterator[str]:
        """Yield the block that Hugging Face reads."""
        pipeline = PIPELINES.get(self.header.get("task", ""))
        matter: dict[str, Any] = {"library_name": "fedddp", "tags": ["federated-learning", self.algorithm]}
        if pipeline:
            matter = {"pipeline_tag": pipeline, **matter}
        if self.dataset in TORCHVISION:
            matter["datasets"] = [self.dataset]
        scores = {n: v for n, v in self.metrics().items() if n != "loss"}
        if pipeline and scores:
            matter["metrics"] = list(scores)
            results = {
                "task": {"type": pipeline},
                "dataset": {"name": self.dataset, "type": self.dataset, "split": "test"},
                "metrics": [{"type": name, "value": value} for name, value in scores.items()],
            }
            matter["model-index"] = [{"name": self.directory.resolve().name, "results": [results]}]
        yield f"---\n{dump_yaml(matter)}---"

    def summary(self) -> Iterator[str]:
        """Yield title and summary."""
        yield f"# {self.directory.resolve().name}"
        clients, version = self.settings["data.clients"], self.header.get("fedddp")
        metric = judged_by(self.rows, best_of(self.config))
        value, score = None if metric is None else number(self.row, metric.key), ""
        if metric is not None and value is not None and metric.of_clients:
            own = ", each with its own model," if ALONE in self.header else ""
            score = f" The {metric.title}{own} is {metric.text(value)}."
        elif metric is not None and value is not None:
            score = f" Its {metric.label.removeprefix('test ')} on the test data is {metric.text(value)}."
        purpose = PURPOSES[self.target].format(network=self.network, classes=len(self.classes))
        chosen = ""
        if self.best:
            chosen = f" It is the best model by {self.header.get('metric')}, of round {self.round}."
        trained = f"with {self.algorithm} on {clients:,} clients"
        if self.header.get("baseline") == "local":
            trained = f"by each of {clients:,} clients alone"
        if self.pooled:
            trained = f"on the data of {clients:,} clients in one place,"
        yield (f"{purpose}, trained {trained} in {self.round:,} rounds, by fedddp {version}.{score}{chosen}")

    def model(self) -> Iterator[str]:
        """Yield what the network takes and gives."""
        channels, (height, width) = self.preprocessing["channels"], self.preprocessing["size"]
        kind = {1: " (grey)", 3: " (RGB)"}.get(channels, "")
        yield markdown_table(
            ("", ""),
            [
                ("network", f"`{self.network}`"),
                ("numbers in the file", f"{self.parameters:,} (weights and statistics)"),
                ("images", f"{channels} × {height} × {width}{kind}"),
                ("mean of pixel / 255", numbers(self.preprocessing["mean"])),
                ("deviation of pixel / 255", numbers(self.preprocessing["std"])),
                ("task", f"`{self.header.get('task')}`"),
                ("classes", some_names(self.classes)),
                ("file", f"`{self.file.name}`"),
            ],
        )

    def data(self) -> Iterator[str]:
        """Yield the dataset and its split over the clients."""
        settings, objects = self.settings, self.config.get(OBJECTS, {})
        rows = [("dataset", f"`{self.dataset}`")]
        if "examples" in self.split:
            rows.append(("training examples", f"{self.split['examples']:,}"))
        elif "train" in objects:
            rows.append(("training examples", f"{objects['train']['examples']:,}"))
        tested = self._tested()
        if tested:
            rows.append(("test examples", f"{tested:,}"))
        rows.append(("clients", escaped(named_clients(self.split, settings["data.clients"]))))
        rows.append(("partition", choice(self.config["data"].get("partition"))))
        sizes = [self.split.get(name) for name in ("smallest", "median", "largest")]
        if all(isinstance(size, int | float) for size in sizes):
            rows.append(("examples per client", f"{sizes[0]:,g} to {sizes[2]:,g}, median {sizes[1]:,g}"))
        if isinstance(self.split.get("classes_per_client"), int | float):
            rows.append(("classes per client", f"{self.split['classes_per_client']:.3g} on average"))
        if settings.get("data.holdout"):
            rows.append(("held out per client", f"{100 * settings['data.holdout']:g} %"))
        if self.config["data"].get("feature_shift"):
            rows.append(("feature shift", choice(self.config["data"]["feature_shift"])))
        rows.append(("augmentation", f"`{settings['data.augment']}`"))
        yield markdown_table(("", ""), rows)

    def _tested(self) -> int:
        """Return the number of test examples; 0 where it was not recorded."""
        if isinstance(self.examination.get("examples"), int):
            return int(self.examination["examples"])
        confusion = self.examination.get("confusion")
        if confusion and self.target == "class":  # of masks it counts pixels
            return int(sum(map(sum, confusion)))
        return int(self.config.get(OBJECTS, {}).get("test", {}).get("examples", 0))

    def training(self) -> Iterator[str]:
        """Yield the algorithm and the settings of the training."""
        config, local, cohort = self.config, self.config["local"], self.config["cohort"]
        rows = [
            ("algorithm", choice(config["algorithm"])),
            ("aggregation", choice(config["aggregation"])),
            ("rounds", f"{self.round:,}"),
            ("cohort", "none: all data in one place" if self.pooled else choice(cohort)),
            ("local training", choice(local)),
            ("seed", str(config["seed"])),
        ]
        if self._attacked():
            rows.insert(2, ("attack", choice(config["attacks"])))
        claim = statement(config, until := [row for row in self.rows if row["round"] <= self.round])
        if claim is not None:
            rows.append(("privacy", claim))
        trained = [row["train/examples"] for row in until if "train/examples" in row]
        if trained:
            rows.append(("examples trained on", f"{sum(trained):,}, repetitions counted"))
        up, down = (sum(row.get(f"bytes/{way}", 0) for row in until) for way in ("up", "down"))
        rows.append(("bytes", f"{up:,} sent by clients, {down:,} sent to them"))
        yield markdown_table(("", ""), rows)

    def _attacked(self) -> bool:
        attacks = self.config.get("attacks", {})
        return bool(attacks.get("name", "NoAttack") != "NoAttack" and attacks.get("fraction", 0) > 0)

    def results(self) -> Iterator[str]:
        """Yield metrics, their spread over clients, and those of each class."""
        metrics = self.metrics()
        if not metrics:
            yield "The run recorded no metrics of one model on test data."
        else:
            named = [(Metric(f"eval/{name}"), value) for name, value in metrics.items()]
            rows = [(metric.label, metric.text(value)) for metric, value in named]
            yield f"On the test data, after round {self.round:,}:"
            yield markdown_table(("metric", "value"), rows)
            note = averages_note(metrics, self.config)
            if note:
                yield note
        if self.constant:
            yield self.constant
        judged, clients = self._on_clients(), self._client_rows()
        if judged is not None:
            yield f"{client_data(self.split, len(clients))}, {judged.label} over clients:"
            statistics = ("mean", "worst 10 %", "best 10 %", "standard deviation")
            yield markdown_table(
                statistics, [tuple(judged.text(self.row[judged.on_clients(s)]) for s in SPREAD)]
            )
        else:
            yield "The run recorded no metrics per client (`evaluation.clients`)."
        if judged is not None and clients:
            titles, *lines = client_table(clients, judged)
            yield markdown_table(titles, [(escaped(name), *cells) for name, *cells in lines])
        lists = self.per_class()
        if lists:
            columns = [[class_text(metric, value) for value in values] for metric, values in lists.items()]
            lines = list(zip(self.classes, *columns, strict=True))
            lines.sort(key=lambda line: line[1] == "not tested")
            labels = " and ".join(metric.label for metric in lists)
            few = len(lines) <= MOST_CLASSES
            yield capital(f"{labels} per class:" if few else f"{labels} of {MOST_CLASSES} classes:")
            yield markdown_table(("class", *(metric.label for metric in lists)), lines[:MOST_CLASSES])

    def _on_clients(self) -> Metric | None:
        """Return the metric that the clients are judged by; None where none was measured."""
        means = (key for key in self.row if is_client_score(key) and key.endswith("_mean"))
        key = next((key for key in means if isinstance(self.row[key], float)), None)
        return None if key is None else Metric(f"eval/{key.removeprefix('clients/').removesuffix('_mean')}")

    def _client_rows(self) -> list[Row]:
        path = self.directory / "clients.jsonl"
        rows = read_rows(path) if path.is_file() else []
        return [row for row in rows if row["round"] == self.round]

    def limits(self) -> Iterator[str]:
        """Yield what the run shows of the model's limits."""
        tested = self._tested()
        lines = [
            KNOWS[self.target].format(classes=len(self.classes)),
            sees(self.target, self.preprocessing),
            f"The metrics are of the test data of `{self.dataset}`"
            + (f", {tested:,} examples" if tested else "")
            + "; the run measured it on no other data.",
        ]
        for metric, values in list(self.per_class().items())[:1]:
            lines += lowest(
                metric, [(escaped(n), value) for n, value in zip(self.classes, values, strict=True)]
            )
        judged = self._on_clients()
        if judged is not None:
            worst = judged.text(self.row[judged.on_clients("worst10")])
            lines.append(f"For the worst tenth of the evaluated clients the {judged.label} is {worst}.")
        lines += personal(self.header, self.algorithm)
        if self._attacked():
            share = 100 * self.config["attacks"]["fraction"]
            lines.append(f"{share:g} % of the clients were malicious ({self.config['attacks']['name']}).")
        warnings = read_warnings(self.directory)
        lines += [f"Logged in training: {escaped(line)}" for line in dict.fromkeys(warnings[-MOST_WARNINGS:])]
        yield "\n".join(f"- {line}" for line in lines)

    def use(self) -> Iterator[str]:
        """Yield a program that loads the model, and the commands."""
        run, best = str(self.directory), ", best=True" if self.best else ""
        own = f', module="{self.network}"' if "module" in self.config.get(OBJECTS, {}) else ""
        own += f", client={json.dumps((client_names(self.directory) or ['0'])[0])}" * (ALONE in self.header)
        yield (
            "```python\n"
            "from fedddp import load_model\n\n"
            f"model = load_model({json.dumps(run)}{own}{best})\n" + "\n".join(PREDICTS[self.target]) + "\n```"
        )
        yield "`predict` resizes and normalises images as in training."

    def origin(self) -> Iterator[str]:
        """Yield when, where, and by which command it was trained."""
        names = ("fedddp", "torch")
        rows: list[tuple[str, str]] = [(name, self.header[name]) for name in names if name in self.header]
        if self.record and self.record.sessions:
            first, last = self.record.sessions[0], self.record.sessions[-1]
            commit = last.git_commit
            rows = [
                ("trained", f"{first.started} to {last.ended or 'unknown'}"),
                ("launches", str(len(self.record.sessions))),
                ("command", f"`{last.command}`"),
                (
                    "git commit",
                    "none" if commit is None else commit.replace("+", " with uncommitted changes"),
                ),
                (
                    "versions",
                    f"fedddp {last.fedddp}, PyTorch {last.torch}, torchvision {last.torchvision}, "
                    f"Python {last.python}",
                ),
                ("device", f"{last.device}; ranks: {last.ranks}, client groups: {last.groups}"),
                ("platform", last.platform),
            ]
        digest = self.header.get("config_digest")
        if digest:
            rows.append(("digest of the settings", f"`{digest}`"))
        yield markdown_table(("", ""), rows)
        settings = {key: value for key, value in self.config.items() if key not in EDITED}
        yield f"<details><summary>Settings</summary>\n\n```yaml\n{dump_yaml(settings)}```\n\n</details>"
