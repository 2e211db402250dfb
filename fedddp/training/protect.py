"""Makes what protects the clients of a run, from its section `privacy` and what its directory records."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedddp.config.schema import Config
from fedddp.privacy.accountant import require_library
from fedddp.privacy.central import CentralProtection
from fedddp.privacy.config import CentralDP, ExampleDP, LocalDP
from fedddp.privacy.example import ExampleAccount, ExampleProtection
from fedddp.privacy.local import LocalProtection, Participations, local_terms
from fedddp.privacy.protection import Protection, Terms, calibrated_terms, check_model
from fedddp.section import ConfigError
from fedddp.storage.checkpoint import write_text
from fedddp.storage.history import HISTORY, read_json, read_rows
from fedddp.storage.run_record import read_record
from fedddp.training.private_trainer import PrivateTrainer
from fedddp.training.session import Session

logger = logging.getLogger(__name__)

LEDGER = "privacy.json"
"""File of a run with secret noise: its noise multiplier, which no resume may change, and the number of rounds
that were released, lost, and released again."""


def check_library(config: Config) -> None:
    """Refuse a run whose account needs dp-accounting where it is not installed; before any work.

    Raises:
        ConfigError: it is not installed.
    """
    privacy = config.privacy
    needed = isinstance(privacy, ExampleDP) or (
        isinstance(privacy, CentralDP)
        and privacy.account(config.cohort, config.data.clients, config.rounds).needs_library
    )
    if needed:
        require_library()


def protect(s: Session, metadata: Mapping[str, Any]) -> Protection:
    """Collective. Return what protects the clients of `s`, which resumes from a checkpoint with `metadata`.

    To be called before the history is opened, which cuts off what the checkpoint does not have.

    Raises:
        ValueError: the model cannot be protected, or the budget does not allow a round.
    """
    privacy, server = s.config.privacy, s.server
    if privacy is None:
        return Protection()
    check_model(s.flat, s.config.algorithm, privacy)
    terms, problem = None, None
    if s.world.is_coordinator:
        try:
            terms = _terms(s, metadata)
            if privacy.noise == "secret":  # rounds may be released and lost before the first checkpoint
                kept = {"noise_multiplier": terms.noise_multiplier, "repeated": terms.repeated}
                write_text(s.directory / LEDGER, json.dumps(kept) + "\n")
        except ValueError as error:
            problem = str(error)
    terms, problem = s.world.gather((terms, problem))[0]
    if terms is None:
        raise ConfigError(problem)
    if s.world.is_coordinator and terms.last_round < s.config.rounds:
        logger.info(
            "privacy: the budget ends the run after round %d of %d", terms.last_round, s.config.rounds
        )
    seed = s.config.seed
    if isinstance(privacy, ExampleDP):
        assert isinstance(s.trainer, PrivateTrainer)
        s.trainer.noise_multiplier = terms.noise_multiplier
        account = example_account(s.config, privacy, s.sizes, terms.repeated)
        return ExampleProtection(privacy, account, terms)
    if isinstance(privacy, CentralDP):
        cohorts = privacy.account(s.config.cohort, len(s.split), s.config.rounds)
        return CentralProtection(privacy, cohorts, terms, server, seed=seed)
    assert isinstance(privacy, LocalDP)
    participations = participations_of(s.config, len(s.split))
    return LocalProtection(privacy, terms, participations, seed=seed)


def participations_of(config: Config, population: int) -> Participations:
    """Return how often each of `population` clients is sampled, before the first round."""
    return Participations(population, lambda index: config.cohort.sample(population, config.seed, index))


def example_account(
    config: Config, privacy: ExampleDP, sizes: NDArray[np.int64], repeated: int = 0
) -> ExampleAccount:
    """Return what DP-SGD costs clients with `sizes` examples, (N,), of which rounds were `repeated`.

    Raises:
        ValueError: δ is too large for them.
    """
    return ExampleAccount(
        sizes,
        config.local,
        config.algorithm.passes,
        participations_of(config, len(sizes)),
        delta=privacy.delta,
        rounds=config.rounds,
        repeated=repeated,
    )


def _terms(s: Session, metadata: Mapping[str, Any]) -> Terms:
    """Return what the run is held to: what its checkpoint recorded of it, and what was lost since then."""
    config, privacy = s.config, s.config.privacy
    assert privacy is not None
    earlier = metadata.get("privacy", {})
    if not earlier and config.resume == "auto":
        earlier = read_json(s.directory / LEDGER)
    repeated = 0
    if config.resume == "auto" and privacy.noise == "secret":
        repeated = _charge_lost_rounds(
            s.directory,
            int(metadata.get("round", 0)),
            int(earlier.get("repeated", 0)),
            in_progress=not isinstance(privacy, CentralDP) and _lost_a_round_in_progress(s),
        )
    kept = earlier.get("noise_multiplier")
    if isinstance(privacy, ExampleDP):
        examples = example_account(config, privacy, s.sizes, repeated)
        if examples.full_batches:
            logger.warning(
                "privacy: %d clients have no more than local.batch_size=%d examples and take all of them at "
                "every step, which amplifies nothing; a smaller batch size lowers ε",
                *(examples.full_batches, config.local.batch_size),
            )
        return calibrated_terms(privacy, examples, config.rounds, kept, repeated)
    if isinstance(privacy, CentralDP):
        account = privacy.account(config.cohort, len(s.split), config.rounds)
        return calibrated_terms(privacy, account, config.rounds, kept, repeated)
    assert isinstance(privacy, LocalDP)
    return local_terms(privacy, participations_of(config, len(s.split)), config.rounds, repeated)


def _lost_a_round_in_progress(s: Session) -> bool:
    """Return whether the last launch may have ended within a round of which its checkpoint has nothing.

    Where clients add noise themselves, what those that had trained sent is seen, and is sent again.
    """
    record, privacy = read_record(s.directory), s.config.privacy
    assert privacy is not None
    if record is None:  # of a run that never began, unless it cannot be read
        return (s.directory / HISTORY).exists()
    if record.state == "finished":
        return False
    kept = not privacy.strict and s.config.secure_aggregation is None
    corrupt = any((s.directory / "checkpoints").glob(".corrupt-*"))  # it may be the one of the stop
    return record.state != "stopped" or not kept or corrupt


def _charge_lost_rounds(directory: Path, kept_rounds: int, repeated: int, *, in_progress: bool) -> int:
    """Return how many rounds are charged again, and write it down before the history forgets them.

    A round whose line is in the history was released: its metrics are of its noisy model. After a resume it
    is repeated with other noise, and both are seen. A line that is cut short counts.

    Args:
        directory: the run directory.
        kept_rounds: rounds that the checkpoint has.
        repeated: rounds that were charged again before the checkpoint.
        in_progress: whether one more was lost before its line was written.
    """
    ledger, history = directory / LEDGER, directory / HISTORY
    repeated = max(repeated, int(read_json(ledger).get("repeated", 0)))
    lost = int(in_progress)
    if history.exists():
        lost += len([row for row in read_rows(history) if row["round"] > kept_rounds])
        content = history.read_bytes()
        lost += bool(content) and not content.endswith(b"\n")
    if lost:
        repeated += lost
        logger.warning(
            "privacy: %d rounds were released and lost with their process; they are charged again", lost
        )
        write_text(ledger, json.dumps(read_json(ledger) | {"repeated": repeated}) + "\n")
    return repeated
