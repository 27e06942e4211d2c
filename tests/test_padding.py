"""Padding, 4-D masks and packed sequences: the same outputs and the same statistics however a batch is laid out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import ALL_LOSSES, counts, padded_batch, recorded, tiny
from torch import Tensor
from transformers import StaticCache

from hf_moe import MoECausalLMOutputWithPast, MoEForCausalLM, RoutingRecord
from hf_moe.pretrained_moe import LOSS_COEFFICIENTS
from hf_moe.record import current_record

# Kernels sum over other shapes when there is more padding, in another order.
ROUNDING = 5e-6
FIELDS = {
    "top_k": {"router_z_loss_coef": 0.1},
    "capacity": {"capacity_factor": 0.7, "eval_capacity_factor": 0.7, "router_z_loss_coef": 0.1},
    "expert_choice": {"router_type": "expert_choice", "allow_non_causal": True},
    "strictly_balanced": {"router_type": "strictly_balanced"},
    "noisy_top_k": {"router_type": "noisy_top_k", "num_experts_per_tok": 1, **ALL_LOSSES},
}
NOISY = ("noisy_top_k",)  # these draw other noise for other shapes, so they are compared in evaluation only


def run(model: MoEForCausalLM, **batch: Tensor) -> tuple[MoECausalLMOutputWithPast, list[list[float]]]:
    """The outputs, and what was executed if in training."""
    with recorded(model) as records:
        outputs = model(**batch, output_router_logits=True)
    return outputs, counts(records, "executed")


def assert_same(found: tuple, expected: tuple, found_real: Tensor, expected_real: Tensor, tolerance: float) -> None:
    """Equal losses, counts, and outputs and router logits of the real tokens (in the order of rows and columns)."""
    (got, got_counts), (wanted, wanted_counts) = found, expected
    assert got_counts == wanted_counts
    names = [name for name in ("loss", "lm_loss", *LOSS_COEFFICIENTS) if wanted.get(name) is not None]
    assert len(names) > 2
    for name in names:
        torch.testing.assert_close(got[name], wanted[name], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got.logits[found_real], wanted.logits[expected_real], rtol=tolerance, atol=tolerance)
    for logits, wanted_logits in zip(got.router_logits, wanted.router_logits, strict=True):
        torch.testing.assert_close(
            logits[found_real.flatten()], wanted_logits[expected_real.flatten()], rtol=tolerance, atol=tolerance
        )


def more_columns(side: str) -> dict[str, Tensor]:
    return padded_batch(side, extra=5)


def more_rows(side: str) -> dict[str, Tensor]:
    batch = padded_batch(side)
    empty = {name: torch.zeros_like(value[:1]) for name, value in batch.items()}
    empty["labels"] -= 100
    return {name: torch.cat([batch[name], empty[name]]) for name in batch}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", [more_columns, more_rows])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("fields", FIELDS)
def test_padding_changes_nothing(fields: str, side: str, change: Callable, training: bool) -> None:
    if training and fields in NOISY:
        pytest.skip("other shapes draw other noise")
    model = tiny(**FIELDS[fields]).train(training)
    model.config.balance_scope = "micro_batch"
    batch, changed = padded_batch(side), change(side)
    assert_same(
        run(model, **changed),
        run(model, **batch),
        changed["attention_mask"].bool(),
        batch["attention_mask"].bool(),
        ROUNDING,
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "falcon", "qwen3"])
def test_padded_equals_alone(family: str, side: str) -> None:
    """Each sequence of a padded batch gets the logits that it gets alone, with capacity as well."""
    model = tiny(family, **FIELDS["capacity"])
    batch = padded_batch(side)
    together = model(**batch).logits
    for row, mask in enumerate(batch["attention_mask"].bool()):
        alone = model(input_ids=batch["input_ids"][row, mask].unsqueeze(0)).logits
        torch.testing.assert_close(together[row, mask], alone[0], rtol=ROUNDING, atol=ROUNDING)


def block_diagonal(batch: dict[str, Tensor]) -> Tensor:
    """The `[B, 1, S, S]` bool mask that a 2-D mask stands for."""
    length = batch["attention_mask"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return causal & batch["attention_mask"].bool()[:, None, None, :]


def additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["bool", "additive", "by_layer_type"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("fields", ["capacity", "expert_choice"])
def test_4d_mask(fields: str, side: str, kind: str, attention: str, training: bool) -> None:
    """A 4-D mask gives the statistics, losses and outputs of the 2-D mask that it spells out."""
    if attention == "eager" and kind == "bool":
        pytest.skip("Transformers' eager attention adds the mask, so it takes no bool")
    family = "gemma3" if kind == "by_layer_type" else "llama"  # the other layers of this one have a sliding window
    model = tiny(family, **FIELDS[fields]).train(training)
    model.set_attn_implementation(attention)
    batch = padded_batch(side)
    allowed = block_diagonal(batch)
    mask = {
        "bool": allowed,
        "additive": additive(allowed),
        "by_layer_type": {name: additive(allowed) for name in ("full_attention", "sliding_attention")},
    }[kind]
    real = batch["attention_mask"].bool()
    # eager attention over a row that is all masked is uniform for the one spelling and zero for the other: padding only
    assert_same(run(model, **{**batch, "attention_mask": mask}), run(model, **batch), real, real, 1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("given", ["position_ids", "4d_mask"])
def test_packed_sequences(given: str, attention: str) -> None:
    """Sequences packed into one row give the logits and the losses that they give as rows."""
    model = tiny(router_z_loss_coef=0.1)
    model.set_attn_implementation(attention)
    model.config.use_cache = False  # as `Trainer` does; with a cache Transformers takes no row for a packed one
    rows = padded_batch("right")
    real = rows["attention_mask"].bool()
    packed = {name: rows[name][real].unsqueeze(0) for name in ("input_ids", "position_ids", "labels")}
    if given == "4d_mask":
        sequence = real.nonzero()[:, 0]
        same = sequence.unsqueeze(0) == sequence.unsqueeze(1)
        packed["attention_mask"] = additive((same & torch.ones_like(same).tril())[None, None])
    everywhere = torch.ones_like(packed["input_ids"], dtype=torch.bool)
    assert_same(run(model, **packed), run(model, **rows), everywhere, real, ROUNDING)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_eager_equals_sdpa(family: str) -> None:
    batch = {name: value for name, value in padded_batch().items() if name != "position_ids"}
    real = batch["attention_mask"].bool()
    found = {}
    for attention in ("eager", "sdpa"):
        model = tiny(family, router_z_loss_coef=0.1)
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == model.language_model.config._attn_implementation == attention
        found[attention] = run(model, **batch)
    assert_same(found["eager"], found["sdpa"], real, real, ROUNDING)


@pytest.mark.parametrize("kind", ["2d", "additive", "static"])
def test_masks_with_a_cache(kind: str) -> None:
    """A cached forward takes its own tokens' part of the mask: statistics are those of the real ones among them."""
    model = tiny(router_type="expert_choice", allow_non_causal=True)
    batch = padded_batch("left", lengths=(12, 9, 2))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=16) if kind == "static" else None
    before = {name: value[:, :9] for name, value in batch.items() if name != "labels"}
    past = model(**before, past_key_values=cache, use_cache=True).past_key_values
    mask = {"2d": batch["attention_mask"], "additive": additive(block_diagonal(batch)[:, :, 9:])}.get(kind)
    if mask is None:  # up to the length of the cache
        mask = torch.nn.functional.pad(block_diagonal(batch)[:, :, 9:], (0, 4))
    after = {"input_ids": batch["input_ids"][:, 9:], "position_ids": batch["position_ids"][:, 9:]}
    with record_of(model) as records:
        model(**after, attention_mask=mask, past_key_values=past, output_router_logits=True)
    assert [layer.sums["tokens"].item() for layer in records[0].layers] == [3 + 3 + 2] * 3


@contextmanager
def record_of(model: MoEForCausalLM) -> Iterator[list[RoutingRecord]]:
    """Records of forwards in evaluation, which listeners do not get."""
    records: list[RoutingRecord] = []
    hooks = [layer.register_forward_hook(lambda *_: records.append(current_record())) for layer in model.moe_layers]
    yield records
    for hook in hooks:
        hook.remove()
