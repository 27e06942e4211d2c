"""hf_moe: turns any dense causal LM of Transformers into a Mixture-of-Experts, trains it right, and ships it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_moe import PRESETS, MoEConfig
from .dense_ffn import UnsupportedArchitectureError
from .modeling_moe import MoECausalLMOutputWithPast, MoEForCausalLM, MoEModel
from .moe_layer import MoELayer
from .record import RoutingRecord, checkpoint_with_record, record_routing
from .routing import Routing
from .version import __version__

AutoConfig.register(MoEConfig.model_type, MoEConfig, exist_ok=True)
AutoModel.register(MoEConfig, MoEModel, exist_ok=True)
AutoModelForCausalLM.register(MoEConfig, MoEForCausalLM, exist_ok=True)

__all__ = [
    "PRESETS",
    "MoECausalLMOutputWithPast",
    "MoEConfig",
    "MoEForCausalLM",
    "MoELayer",
    "MoEModel",
    "Routing",
    "RoutingRecord",
    "UnsupportedArchitectureError",
    "__version__",
    "checkpoint_with_record",
    "record_routing",
]
