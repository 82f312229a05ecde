"""Predictions of a run: memory, floating-point operations, bytes and seconds of a step, per rank.

Knows the shapes of the model, what Megatron-core keeps of them, and measured speeds. Does not import torch, and runs
nothing: everything here is arithmetic on a configuration.
"""

from dash_dist.planning.assumptions import Assumptions
from dash_dist.planning.hardware import GPUS, Gpu, Machine
from dash_dist.planning.layouts import Layout
from dash_dist.planning.prediction import Prediction, predict
from dash_dist.planning.search import best_layouts

__all__ = ["GPUS", "Assumptions", "Gpu", "Layout", "Machine", "Prediction", "best_layouts", "predict"]
