"""How client updates become one: exact weighted sums, and robust rules that see the updates apart."""

from fedddp.aggregation.aggregation import Accumulator, AdmittedUpdate, Aggregation, InvalidUpdateError
from fedddp.aggregation.mean import Mean
from fedddp.aggregation.robust import (
    Bulyan,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    RobustAggregation,
    TrimmedMean,
)

__all__ = [
    "Accumulator",
    "AdmittedUpdate",
    "Aggregation",
    "Bulyan",
    "CoordinateMedian",
    "GeometricMedian",
    "InvalidUpdateError",
    "Krum",
    "Mean",
    "MultiKrum",
    "RobustAggregation",
    "TrimmedMean",
]
