"""What a run may claim of the privacy of its clients, in one line: before it, from its files after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedddp.privacy.config import CalibratedDP, CentralDP, ExampleDP, LocalDP, Privacy
from fedddp.privacy.local import Participations, composed_epsilon, local_terms
from fedddp.privacy.protection import calibrated_terms
from fedddp.storage.history import number

OUTSIDE = "losses, cohorts and clients' numbers and states in the run's files are not protected"
OUTSIDE_EXAMPLES = "losses, and metrics on clients' data, in the run's files are not protected"
"""With ExampleDP, where what clients keep is protected."""
OUTSIDE_SECURE = "losses, summed over clients, and clients' states in the run's files are not protected"
"""With secure aggregation, where no file names a cohort."""


def statement(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return what a run with the sections `config` and the history `rows` may claim; None without privacy."""
    privacy = config.get("privacy")
    last = next((row for row in reversed(rows) if number(row, "privacy/epsilon") is not None), None)
    if not isinstance(privacy, Mapping) or last is None:
        return None
    simulated = "simulated " if last.get("privacy/simulated") else ""
    of_examples = privacy.get("name") == ExampleDP.__name__
    whom = "each example of a client" if of_examples else "each client"
    text = (
        f"{simulated}ε = {last['privacy/epsilon']:.4g} at δ = {privacy.get('delta')} for {whom}, "
        f"{privacy.get('name')}, after round {last['round']}"
    )
    if simulated:
        text += "; its noise follows from the seed"
    if of_examples:
        text += "; numbers of examples count as public"
    if privacy.get("strict"):
        return text
    if of_examples:
        return f"{text}; {OUTSIDE_EXAMPLES}"
    return f"{text}; {OUTSIDE if config.get('secure_aggregation') is None else OUTSIDE_SECURE}"


def forecast(privacy: Privacy, account: Any, participations: Participations, rounds: int) -> str:
    """Return the noise and the ε of a run of `rounds` rounds, before it.

    Args:
        privacy: the settings.
        account: of the rounds (`Account`, or for ExampleDP `ExampleAccount`); not used for LocalDP.
        participations: how often clients are sampled, before the first round; for LocalDP.
        rounds: rounds of the run.

    Raises:
        ValueError: the budget does not allow a first round.
    """
    simulated = "simulated " if privacy.noise == "seeded" else ""
    if isinstance(privacy, CalibratedDP):
        terms = calibrated_terms(privacy, account, rounds, None, 0)
        epsilon = account.epsilon(terms.noise_multiplier, terms.last_round)
        if isinstance(privacy, CentralDP):
            privacy.noise_of_update(terms.noise_multiplier, account.cohort)
        text = f"noise multiplier {terms.noise_multiplier:.5g}: {simulated}ε = {epsilon:.4g}"
        ends = f"at δ = {privacy.delta:g} after round {terms.last_round} ({account.words})"
    else:
        assert isinstance(privacy, LocalDP)
        counted = Participations(len(participations.counts), participations.sample)
        terms = local_terms(privacy, participations, rounds, 0)
        most = counted.most(terms.last_round)
        text = f"σ = {2 * privacy.clip / terms.noise_multiplier:.4g} on every element: {simulated}"
        text += f"ε = {composed_epsilon(privacy, most):.4g}"
        ends = (
            f"at δ = {privacy.delta:g} after round {terms.last_round}, of a client that trains {most} times"
        )
    budget = (
        "" if terms.last_round == rounds else f"; the budget ends the run there, not after round {rounds}"
    )
    return f"{text} {ends}{budget}"
