"""Differential privacy of the clients: clipping, noise, and what both cost."""

from fedddp.privacy.accountant import Account, Release, epsilon, renyi_epsilon, without_replacement_epsilon
from fedddp.privacy.config import CentralDP, ExampleDP, LocalDP, Privacy
from fedddp.privacy.gaussian import delta_of, epsilon_of, mu_of

__all__ = [
    "Account",
    "CentralDP",
    "ExampleDP",
    "LocalDP",
    "Privacy",
    "Release",
    "delta_of",
    "epsilon",
    "epsilon_of",
    "mu_of",
    "renyi_epsilon",
    "without_replacement_epsilon",
]
