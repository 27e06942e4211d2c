"""Recomputed layers route as they did in the forward, see the same padding, and count nothing twice."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from tiny import ALL_LOSSES, counts, gradients, largest_difference, padded_batch, recorded, tiny
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers import modeling_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_moe import MoEForCausalLM, MoELayer, record_routing
from hf_moe.record import checkpoint_with_record

ROUTERS = {
    "noisy_top_k": {"router_type": "noisy_top_k", "capacity_factor": 0.8, **ALL_LOSSES},
    "gshard": {"router_type": "gshard", "capacity_factor": 0.8, "router_z_loss_coef": 0.1},
    "hierarchical": {"router_type": "hierarchical", "n_group": 2, "topk_group": 2, **ALL_LOSSES},
    "expert_choice": {"router_type": "expert_choice", "allow_non_causal": True},
    "top_k_jitter": {"router_jitter_noise": 0.3, "capacity_factor": 0.5, "router_z_loss_coef": 0.1},
    "hash": {"router_type": "hash", "capacity_factor": 0.8},
}


def step(model: MoEForCausalLM, forwards: int = 1) -> tuple[Tensor, dict[str, Tensor], list[list[float]]]:
    """Loss, gradients and counts of `forwards` forwards with different padding before one backward."""
    model.train().zero_grad()
    torch.manual_seed(3)
    batches = [padded_batch("right"), padded_batch("left", (6, 11, 9), seed=1)][:forwards]
    with recorded(model) as records:
        loss = torch.stack([model(**batch, use_cache=False).loss for batch in batches]).sum()
        loss.backward()
    assert len(records) == forwards
    return loss.detach(), gradients(model), counts(records, "executed")


def assert_same(model: MoEForCausalLM, reference: MoEForCausalLM, forwards: int = 1) -> None:
    """Bit by bit: a recompute does the same operations in the same order."""
    (loss, found, executed), expected = step(model, forwards), step(reference, forwards)
    assert torch.equal(loss, expected[0])
    assert executed == expected[2]
    assert largest_difference(found, expected[1]) == 0.0
    assert all(found[name].abs().max() > 0 for name in found if ".gate.weight" in name)


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("router", ROUTERS)
def test_equals_no_checkpointing(router: str, forwards: int) -> None:
    model = tiny(**ROUTERS[router])
    reference = copy.deepcopy(model)
    model.activation_checkpointing_enable()
    assert_same(model, reference, forwards)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing
    assert_same(model, reference, forwards)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "falcon"])
def test_families(family: str) -> None:
    model = tiny(family, **ROUTERS["noisy_top_k"])
    reference = copy.deepcopy(model)
    model.activation_checkpointing_enable()
    assert_same(model, reference)


@pytest.mark.parametrize(
    "settings",
    [
        {"every_n_layers": 2},
        {"offload": True},
        {"activation_checkpointing_kwargs": {"preserve_rng_state": False}},  # and `use_reentrant` left open
        {"activation_checkpointing_kwargs": {"preserve_rng_state": False}, "offload": True},
    ],
    ids=str,
)
def test_settings(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = modeling_utils.save_on_cpu  # a machine without accelerator has no pinned memory
    monkeypatch.setattr(modeling_utils, "save_on_cpu", lambda pin_memory, device_type: pinned(pin_memory=False))
    model = tiny(**ROUTERS["noisy_top_k"])
    reference = copy.deepcopy(model)
    model.activation_checkpointing_enable(**settings)
    assert_same(model, reference, forwards=2)


@pytest.mark.parametrize("offload", [False, True])
def test_reentrant_is_refused(offload: bool) -> None:
    with pytest.raises(ValueError, match=r"use_reentrant.*router losses.*use_reentrant=False"):
        tiny().activation_checkpointing_enable({"use_reentrant": True}, offload=offload)


# ---------------------------------------------------------------------- checkpointing that is not Transformers' own


def wrap_layers(model: nn.Module, **arguments: object) -> None:
    """What accelerate does to the decoder layers for FSDP's activation checkpointing."""
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, **arguments),
        check_fn=lambda module: isinstance(module, GradientCheckpointingLayer),
    )


@pytest.mark.parametrize("keep_rng_state", [True, False])  # FSDP2 in accelerate: False
@pytest.mark.parametrize("router", ROUTERS)
def test_checkpoint_wrapper(router: str, keep_rng_state: bool) -> None:
    model = tiny(**ROUTERS[router])
    reference = copy.deepcopy(model)
    wrap_layers(model, preserve_rng_state=keep_rng_state)
    assert_same(model, reference, forwards=2)
    assert_same(model, reference, forwards=2)


def test_checkpoint_wrapper_of_a_checkpoint_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrappers of MoE layers inside wrappers of decoder layers, and offloading around them."""
    model = tiny(**ROUTERS["noisy_top_k"])
    reference = copy.deepcopy(model)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, MoELayer))
    wrap_layers(model, preserve_rng_state=False)
    layers = model.get_decoder().layers
    wrapper = offload_wrapper(layers[0])
    monkeypatch.setattr(wrapper, "forward", layers[0].forward)  # pinned memory again
    layers[0] = wrapper
    assert_same(model, reference, forwards=2)


def test_reentrant_checkpoint_wrapper_is_refused() -> None:
    model = tiny().train()
    wrap_layers(model, checkpoint_impl=CheckpointImpl.REENTRANT)
    with pytest.raises(ValueError, match=r"use_reentrant.*router losses.*use_reentrant=False"):
        model(**padded_batch())


class Block(nn.Module):
    """A model of the user's own: a MoE layer in a checkpoint of the user's own."""

    def __init__(self, checkpointed: Callable) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = MoELayer(16, num_experts=4, intermediate_size=8, capacity_factor=0.6, router_jitter_noise=0.2)
        self.checkpointed = checkpointed

    def run(self, with_record: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        x, mask = torch.randn(2, 6, 16), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
        if with_record:
            with record_routing(token_mask=mask) as record:
                loss = self.checkpointed(self.layer, x.requires_grad_()).square().sum()
            loss = loss + record.losses()["aux_loss"]
        else:
            loss = self.checkpointed(self.layer, x.requires_grad_()).square().sum()
        loss.backward()
        return gradients(self)


NOT_REENTRANT = partial(checkpoint, use_reentrant=False)


def test_own_checkpoint() -> None:
    expected = Block(lambda function, *args: function(*args)).run(with_record=True)
    assert largest_difference(Block(checkpoint_with_record(NOT_REENTRANT)).run(with_record=True), expected) == 0.0
    blind = partial(NOT_REENTRANT, preserve_rng_state=False)
    assert largest_difference(Block(checkpoint_with_record(blind)).run(with_record=True), expected) == 0.0


@pytest.mark.parametrize("checkpointed", [NOT_REENTRANT, checkpoint_with_record(NOT_REENTRANT)], ids=["plain", "with_record"])
def test_own_checkpoint_without_record(checkpointed: Callable) -> None:
    expected = Block(lambda function, *args: function(*args)).run(with_record=False)
    assert largest_difference(Block(checkpointed).run(with_record=False), expected) == 0.0


def test_unknown_checkpoint_is_refused() -> None:
    """In the forward, before anything is lost; and `checkpoint_with_record` is named as the remedy."""
    with pytest.raises(RuntimeError, match="checkpoint_with_record"):
        Block(NOT_REENTRANT).run(with_record=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        Block(partial(checkpoint, use_reentrant=True)).run(with_record=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        checkpoint_with_record(partial(checkpoint, use_reentrant=True))


def test_evaluation_in_a_checkpoint() -> None:
    """Without gradients nothing is recomputed, so nothing has to be refused."""
    model = tiny()
    wrap_layers(model)
    with torch.no_grad():
        found = model(**padded_batch(), use_cache=False).logits
        assert torch.equal(found, tiny()(**padded_batch()).logits)


def test_decoder_alone() -> None:
    """`get_decoder()`, as TRL's trainers call it, runs without a record, in the recompute as well."""
    found = {}
    for checkpointing in (False, True):
        model = tiny(capacity_factor=0.8).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model.get_decoder()(input_ids=padded_batch()["input_ids"]).last_hidden_state.square().sum().backward()
        found[checkpointing] = gradients(model)
    assert largest_difference(found[True], found[False]) == 0.0
