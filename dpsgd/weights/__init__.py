"""Weights to start from: read without running code, fitted tensor by tensor.

They are public by declaration: no guarantee of this run covers what they were trained
on, and the plan says so.
"""

from dpsgd.weights.fitting import Initialization, fit
from dpsgd.weights.runs import run_weights
from dpsgd.weights.sources import Weights, read_weights

__all__ = ["Initialization", "Weights", "fit", "read_weights", "run_weights"]
