"""How contributions become one: exact weighted sums, and rules that need the updates apart."""

from fedddp.aggregation.mean import Accumulator, Mean

__all__ = ["Accumulator", "Mean"]
