"""Secure aggregation: the coordinator receives the sum of the clients' updates, and no single one."""

from fedddp.secure.settings import SecAgg, SecAggPlus, SecureAggregation

__all__ = ["SecAgg", "SecAggPlus", "SecureAggregation"]
