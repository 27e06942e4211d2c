"""Tiny MoE models and batches with padding, for the tests of `MoEForCausalLM`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from families import text_config
from safetensors import safe_open
from torch import Tensor, nn

from hf_moe import MoEConfig, MoEForCausalLM, RoutingRecord
from hf_moe.pretrained_moe import MoEPreTrainedModel

# Every router loss that a noisy router defines.
ALL_LOSSES = {
    "router_aux_loss_coef": 0.1,
    "router_z_loss_coef": 0.1,
    "router_importance_loss_coef": 0.1,
    "router_load_loss_coef": 0.1,
}


def tiny(family: str = "llama", cls: Any = MoEForCausalLM, text: dict[str, Any] | None = None, **fields: Any) -> Any:
    """A model in evaluation mode, of seed 0, with weights large enough that logits and routing are far from trivial."""
    torch.manual_seed(0)
    dense = text_config(family, initializer_range=0.2, **(text or {}))
    model: MoEPreTrainedModel = cls(MoEConfig(text_config=dense, **{"num_experts": 4, **fields}))
    for layer in model.moe_layers:
        for parameter in layer.gate.parameters():  # some routers start from 0
            nn.init.normal_(parameter, std=0.3)
    for module in model.modules():  # GPT-2 and OPT have dropout by default
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model.eval()


def token_ids(batch: int = 2, length: int = 10, seed: int = 0) -> Tensor:
    """`[B, S]` ids without special tokens."""
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_batch(
    side: str = "right", lengths: tuple[int, ...] = (12, 8, 5), seed: int = 0, extra: int = 0
) -> dict[str, Tensor]:
    """A batch of sequences of these lengths, padded to the longest and `extra` columns more.

    The first token of a sequence has no label: its logits are those of padding where padding is on the left.
    """
    width = max(lengths) + extra
    tokens = token_ids(len(lengths), max(lengths), seed)
    batch = {
        name: torch.zeros(len(lengths), width, dtype=torch.long) for name in ("input_ids", "attention_mask", "position_ids")
    }
    batch["labels"] = torch.full((len(lengths), width), -100)
    for row, length in enumerate(lengths):
        columns = slice(0, length) if side == "right" else slice(width - length, width)
        batch["input_ids"][row, columns] = tokens[row, :length]
        batch["attention_mask"][row, columns] = 1
        batch["position_ids"][row, columns] = torch.arange(length)
        batch["labels"][row, columns] = tokens[row, :length].masked_fill(torch.arange(length) == 0, -100)
    return batch


@contextmanager
def recorded(model: MoEPreTrainedModel) -> Iterator[list[RoutingRecord]]:
    """The records that listeners get inside the block."""
    records: list[RoutingRecord] = []
    model.add_routing_listener(records.append)
    yield records
    model.remove_routing_listener(records.append)


def counts(records: list[RoutingRecord], name: str = "counts") -> list[list[float]]:
    """Assignments per expert, one list per forward and MoE layer."""
    return [layer.sums[name].tolist() for record in records for layer in record.layers]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; checkpoint wrappers leave no trace in the names."""
    named = [(name.replace("_checkpoint_wrapped_module.", ""), p.grad) for name, p in model.named_parameters()]
    return {name: gradient.clone() for name, gradient in named if gradient is not None}


def largest_difference(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over tensors of the same names."""
    assert got.keys() == expected.keys()
    return max((got[name].float() - expected[name].float()).abs().max().item() for name in expected)


def tensors_on_disk(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by their name on disk."""
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    found = {}
    for name in names:
        with safe_open(folder / name, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found
