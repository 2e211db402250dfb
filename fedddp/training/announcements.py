"""What a run logs before its first round: which models there will be, and on what they are evaluated."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fedddp.algorithms.personal import LocalLayers
from fedddp.config.baselines import without_global_model
from fedddp.tasks.segmentation import background_warning

if TYPE_CHECKING:
    from fedddp.training.session import Session

logger = logging.getLogger(__name__)


def announce(s: Session) -> None:
    """Log what a user should know of the models and of their evaluation; on the coordinator."""
    algorithm = s.config.algorithm
    if isinstance(algorithm, LocalLayers):
        logger.info("algorithm=%s: %s", type(algorithm).__name__, algorithm.staying(s.flat))
        norms = algorithm.doubt(s.flat.module)
        if norms:
            logger.warning(norms)
    _clients(s)
    doubt = background_warning(s.config.task, s.train.images.class_names)
    if doubt:
        logger.warning(doubt)


def _clients(s: Session) -> None:
    """Log which clients are evaluated where that is not as set, and which have no examples for it."""
    evaluation, alone = s.config.evaluation, without_global_model(s.config)
    if alone and not (evaluation.clients and s.clients.evaluated_sizes().any()):
        logger.warning("%s: no global model, and nothing is evaluated: %s", alone, _hidden(s))
        return
    if not evaluation.clients:
        if s.config.algorithm.personalizes:
            logger.info(
                "algorithm=%s: eval/* is of the global model; evaluation.clients measures the clients' own",
                type(s.config.algorithm).__name__,
            )
        return
    chosen = evaluation.sample(len(s.clients), s.config.seed)
    if alone:
        logger.info(
            "%s: no global model, so no eval/*; %d of %d clients are evaluated, each with its own model on "
            "its own data (evaluation.clients)",
            *(alone, len(chosen), len(s.clients)),
        )
    without = chosen[s.clients.evaluated_sizes()[chosen] == 0].tolist()
    if without:
        named = [s.clients.names[client] if s.clients.names else str(client) for client in without[:10]]
        more = ", ..." if len(without) > len(named) else ""
        logger.info(
            "%d of the %d clients to evaluate have no examples to evaluate on, and are left out: %s%s",
            *(len(without), len(chosen), ", ".join(named), more),
        )


def _hidden(s: Session) -> str:
    """Return why the clients' own models are not evaluated."""
    if s.config.secure_aggregation is not None:
        return "secure_aggregation allows no metrics of single clients"
    return "clients have no data of their own for it; set data.holdout, e.g. 0.2"
