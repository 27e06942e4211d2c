"""Training with the stock `Trainer`: callbacks, metrics, reports, and the commands `hf-moe train`, `report` and `demo`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alarms import Alarm, AlarmThresholds
    from .callbacks import ExpertLoadCallback, LossFreeBalancingCallback
    from .dead_experts import DeadExpertCallback
    from .load_file import read_expert_load
    from .lora import export_expert_adapters, lora_summary, moe_lora_config
    from .metrics import RoutingWindow, load_metrics
    from .placement import ExpertPlacementCallback
    from .plots import plot_expert_load, plot_load_heat_map
    from .report import write_report
    from .routing_watch import RoutingWatch
    from .schedules import CapacityScheduleCallback, NoiseScheduleCallback, RouterFreezeCallback
    from .trainer import MoETrainer, MoETrainingArguments
    from .watching import watch_routing

# Loaded when asked for: `hf-moe train --help` needs no torch, and much of this does.
_HOMES = {
    "Alarm": "alarms",
    "AlarmThresholds": "alarms",
    "CapacityScheduleCallback": "schedules",
    "DeadExpertCallback": "dead_experts",
    "ExpertLoadCallback": "callbacks",
    "ExpertPlacementCallback": "placement",
    "LossFreeBalancingCallback": "callbacks",
    "MoETrainer": "trainer",
    "MoETrainingArguments": "trainer",
    "NoiseScheduleCallback": "schedules",
    "RouterFreezeCallback": "schedules",
    "RoutingWatch": "routing_watch",
    "RoutingWindow": "metrics",
    "export_expert_adapters": "lora",
    "load_metrics": "metrics",
    "lora_summary": "lora",
    "moe_lora_config": "lora",
    "plot_expert_load": "plots",
    "plot_load_heat_map": "plots",
    "read_expert_load": "load_file",
    "watch_routing": "watching",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


__all__ = [
    "Alarm",
    "AlarmThresholds",
    "CapacityScheduleCallback",
    "DeadExpertCallback",
    "ExpertLoadCallback",
    "ExpertPlacementCallback",
    "LossFreeBalancingCallback",
    "MoETrainer",
    "MoETrainingArguments",
    "NoiseScheduleCallback",
    "RouterFreezeCallback",
    "RoutingWatch",
    "RoutingWindow",
    "export_expert_adapters",
    "load_metrics",
    "lora_summary",
    "moe_lora_config",
    "plot_expert_load",
    "plot_load_heat_map",
    "read_expert_load",
    "watch_routing",
    "write_report",
]
