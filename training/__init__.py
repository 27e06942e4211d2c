"""Training with the stock `Trainer`: callbacks, metrics, pictures, and the scripts `hf-moe train` and `hf-moe demo`."""

from .callbacks import ExpertLoadCallback, LossFreeBalancingCallback
from .metrics import RoutingWindow, load_metrics
from .plots import plot_expert_load

__all__ = ["ExpertLoadCallback", "LossFreeBalancingCallback", "RoutingWindow", "load_metrics", "plot_expert_load"]
