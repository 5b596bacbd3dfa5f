"""Stream statistics from a model into a `Profile`."""

from kvstack.calibrate.means import calibrate

__all__ = ["calibrate"]
