"""The selection axis: which tokens stay. Pure torch, tensors in, tensors out.

`base` says what a scorer is. Each method is one module with a scorer and the frozen dataclass that a recipe names it by:

    forecast                          calibrated networks that read keys and values
    tri, expected                     calibrated statistics of the queries
    snapkv, rkv                       attention of the newest queries
    h2o                               attention of all queries so far
    knorm, keydiff                    the keys alone
    streaming, random                 neither
    oracle                            the queries to come, for evaluations only
"""

from kvstack.scorers.base import ForecastWeights, Future, Layer, QueryStats, Scorer, Selection, View
from kvstack.scorers.expected import Expected
from kvstack.scorers.forecast import Forecast
from kvstack.scorers.h2o import H2O
from kvstack.scorers.keydiff import KeyDiff
from kvstack.scorers.knorm import KNorm
from kvstack.scorers.oracle import Oracle
from kvstack.scorers.random import Random
from kvstack.scorers.rkv import RKV
from kvstack.scorers.snapkv import SnapKV
from kvstack.scorers.streaming import Streaming
from kvstack.scorers.tri import Tri

__all__ = [
    "H2O",
    "RKV",
    "Expected",
    "Forecast",
    "ForecastWeights",
    "Future",
    "KNorm",
    "KeyDiff",
    "Layer",
    "Oracle",
    "QueryStats",
    "Random",
    "Scorer",
    "Selection",
    "SnapKV",
    "Streaming",
    "Tri",
    "View",
]
