"""Stream statistics from a model into a `Profile`, and train its forecast."""

from kvstack.calibrate.forecast import add_forecast
from kvstack.calibrate.stream import calibrate
from kvstack.calibrate.upstream import read_upstream, write_upstream

__all__ = ["add_forecast", "calibrate", "read_upstream", "write_upstream"]
