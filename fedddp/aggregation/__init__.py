"""How contributions become one: exact weighted sums, and rules that need the updates apart."""

from fedddp.aggregation.mean import Accumulator, Mean
from fedddp.aggregation.robust import Bulyan, CoordinateMedian, GeometricMedian, Krum, MultiKrum, TrimmedMean

__all__ = [
    "Accumulator",
    "Bulyan",
    "CoordinateMedian",
    "GeometricMedian",
    "Krum",
    "Mean",
    "MultiKrum",
    "TrimmedMean",
]
