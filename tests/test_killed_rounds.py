"""A rank is killed within a protected round, by SIGKILL: the run that resumes has the undisturbed bits."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import rig
from launching import await_file

from fedddp import CheckpointConfig, Config, privacy
from fedddp.algorithms import SCAFFOLD, FedAvg
from fedddp.privacy.central import CentralProtection
from fedddp.secure import SecAgg, SecAggPlus
from fedddp.secure.protocol import SecureSum
from fedddp.testing import run_world

CENTRAL = privacy.CentralDP(noise_multiplier=0.8, delta=1e-3, clip=0.4)
ADAPTIVE = dataclasses.replace(CENTRAL, adaptive=True, count_noise=1.0)
EVERY = CheckpointConfig(every=1)
CONFIGS = {
    "masked": rig.config_of(SCAFFOLD(), rig.LOCAL, checkpoint=EVERY, secure_aggregation=SecAgg()),
    "unmasked": rig.config_of(FedAvg(), rig.LOCAL, checkpoint=EVERY, secure_aggregation=SecAggPlus()),
    "noise": rig.config_of(FedAvg(), rig.LOCAL, checkpoint=EVERY, privacy=ADAPTIVE),
}
DEATHS: dict[str, tuple[int, type[Any], str, int]] = {
    "masked": (1, SecureSum, "deliver", 6),
    "unmasked": (0, SecureSum, "close", 4),
    "noise": (0, CentralProtection, "adapt", 2),
}
"""The rank, and its call in which it is killed in round 2: a client has sent its masked update; the
coordinator has the unmasked sum; the noise is drawn and C is adapted."""


def train_until_killed(name: str, config: Config, folder: str) -> None:
    rank, owner, method, last = DEATHS[name]
    real, calls = getattr(owner, method), 0

    def fatal(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = real(*arguments)
        if calls == last and os.environ["RANK"] == str(rank):
            # The checkpoint of round 1 is written while round 2 trains.
            await_file(Path(folder, name, "checkpoints", "round-00001"))
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    with mock.patch.object(owner, method, fatal):
        rig.train({name: config}, 1, folder)


def test_runs_that_were_killed_within_a_round_end_with_the_undisturbed_bits(tmp_path: Path) -> None:
    undisturbed = rig.train_in_world(CONFIGS, 2, 1, str(tmp_path / "undisturbed"))
    for name, config in CONFIGS.items():
        # Either rank is the first to be missed: the one that died, or the other, which waits for it.
        with pytest.raises(AssertionError, match=r"rank \d: (died without a traceback|Traceback)"):
            run_world(train_until_killed, name, config, str(tmp_path / "killed"), size=2)
        checkpoints = [folder.name for folder in (tmp_path / "killed" / name / "checkpoints").iterdir()]
        assert checkpoints == ["round-00001"], name
    resumed = {name: dataclasses.replace(config, resume="auto") for name, config in CONFIGS.items()}
    for name, trained in rig.train_in_world(resumed, 2, 1, str(tmp_path / "killed")).items():
        rig.assert_same_bits(trained, undisturbed[name])
