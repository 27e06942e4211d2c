"""What every causal LM of Transformers can do with its inputs and outputs, `MoEForCausalLM` can do."""

import pytest
import torch
from tiny import ALL_LOSSES, counts, padded_batch, recorded, tiny, token_ids
from torch.nn import functional as F

from hf_moe import MoEModel
from hf_moe.pretrained_moe import LOSS_COEFFICIENTS

FAMILIES = ["llama", "gpt2", "falcon", "opt"]  # the last three take no loss arguments: the MoE applies them
NOISY = {"router_type": "noisy_top_k", **ALL_LOSSES}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, items: int | None = None) -> torch.Tensor:
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return total / ((labels[:, 1:] != -100).sum() if items is None else items)


def batch_of(family: str) -> dict[str, torch.Tensor]:
    batch = padded_batch()
    return {name: value for name, value in batch.items() if not (name == "position_ids" and family in ("opt", "falcon"))}


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize("coefficient", [0.0, 0.1, 10.0])
def test_eval_loss_is_the_lm_loss(coefficient: float) -> None:
    """Whatever the coefficients; the router losses are beside it, without them."""
    batch = padded_batch()
    outputs = tiny(**{**NOISY, **dict.fromkeys(ALL_LOSSES, coefficient)})(**batch)
    expected = tiny(**NOISY)(**batch)
    assert torch.equal(outputs.loss, expected.loss)
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits, batch["labels"]), rtol=1e-6, atol=1e-6)
    for name in ("lm_loss", "aux_loss", "z_loss", "importance_loss", "load_loss"):
        assert torch.equal(outputs[name], expected[name])
    assert outputs.aux_loss > 1
    assert outputs.threshold_loss is None


def test_training_loss_is_the_sum() -> None:
    model = tiny(**{**ALL_LOSSES, "router_type": "noisy_top_k", "router_z_loss_coef": 0.3}).train()
    outputs = model(**padded_batch())
    expected = outputs.lm_loss
    for name, field in LOSS_COEFFICIENTS.items():
        if name in outputs:
            expected = expected + getattr(model.config, field) * outputs[name]
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-6, atol=1e-6)
    assert outputs.loss > outputs.lm_loss


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", FAMILIES)
def test_num_items_in_batch(family: str, training: bool) -> None:
    """An int or a tensor, of any shape that `Trainer` may give; the loss is the sum over labels divided by it."""
    batch = batch_of(family)
    model = tiny(family, router_z_loss_coef=0.1).train(training)
    found = [model(**batch, num_items_in_batch=items) for items in (50, torch.tensor(50), torch.tensor([50]))]
    for outputs in found:
        expected = cross_entropy(outputs.logits, batch["labels"], 50)
        torch.testing.assert_close(outputs.lm_loss, expected.view_as(outputs.lm_loss), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(outputs.loss.view(()), found[0].loss.view(()), rtol=1e-6, atol=1e-6)
    share = (batch["labels"][:, 1:] != -100).sum() / 50
    router = 0.01 * found[0].aux_loss + 0.1 * found[0].z_loss if training else 0.0
    torch.testing.assert_close(found[0].loss, found[0].lm_loss + share * router, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_labels(family: str) -> None:
    """-100 has no loss; and a batch without labels has none, but logits."""
    batch = batch_of(family)
    batch["labels"][:2] = -100
    outputs = tiny(family)(**batch)
    torch.testing.assert_close(outputs.loss, cross_entropy(outputs.logits[2:], batch["labels"][2:]), rtol=1e-6, atol=1e-6)
    del batch["labels"]
    without = tiny(family).train()(**batch)
    assert without.loss is None
    assert without.aux_loss.requires_grad  # a trainer with a loss of its own adds it


# ---------------------------------------------------------------------- inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_embeds(family: str) -> None:
    model, batch = tiny(family, router_z_loss_coef=0.1).train(), batch_of(family)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with recorded(model) as records:
        expected = model(**batch)
        del batch["input_ids"]
        outputs = model(inputs_embeds=embeddings, **batch)
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.loss, expected.loss)
    both = counts(records)
    assert both[:3] == both[3:]


def test_missing_inputs() -> None:
    with pytest.raises(ValueError, match=r"input_ids.*inputs_embeds"):
        tiny()(attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"'hash' routes by token id.*input_ids"):
        tiny(router_type="hash")(inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([2, 5])], ids=str)
def test_logits_to_keep(keep: int | torch.Tensor) -> None:
    model, ids = tiny(), token_ids()
    full = model(input_ids=ids).logits
    expected = full[:, -keep:] if isinstance(keep, int) else full[:, keep]
    # a matrix product of fewer rows may add in another order
    torch.testing.assert_close(model(input_ids=ids, logits_to_keep=keep).logits, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------- outputs


def test_hidden_states_and_attentions() -> None:
    model, ids = tiny(), token_ids()
    model.set_attn_implementation("eager")
    outputs = model(input_ids=ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(2, 10, 32)] * 4
    assert [tuple(a.shape) for a in outputs.attentions] == [(2, 4, 10, 10)] * 3
    assert [tuple(r.shape) for r in outputs.router_logits] == [(20, 4)] * 3
    assert torch.equal(model.get_output_embeddings()(outputs.hidden_states[-1]), outputs.logits)
    plain = model(input_ids=ids)
    assert plain.hidden_states is plain.attentions is plain.router_logits is None


def test_router_logits_by_config() -> None:
    model = tiny(output_router_logits=True)
    assert len(model(input_ids=token_ids()).router_logits) == 3
    assert model(input_ids=token_ids(), output_router_logits=False).router_logits is None


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_return_dict_false(training: bool) -> None:
    """A tuple of what is there: the loss first, or the logits if there is none."""
    model = tiny().train(training)
    outputs = model(**padded_batch(), output_router_logits=True)
    as_tuple = model(**padded_batch(), output_router_logits=True, return_dict=False)
    assert type(as_tuple) is tuple
    assert len(as_tuple) == len(outputs.to_tuple())
    assert torch.equal(as_tuple[0], outputs.loss)
    logits = model.eval()(input_ids=token_ids(), return_dict=False)[0]
    assert torch.equal(logits, model(input_ids=token_ids()).logits)


def test_bare_model_outputs() -> None:
    model, batch = tiny(cls=MoEModel), padded_batch()
    del batch["labels"]
    outputs = model(**batch, output_router_logits=True, output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, outputs.hidden_states[-1])
    assert len(outputs.router_logits) == 3
    assert torch.equal(model(**batch, return_dict=False)[0], outputs.last_hidden_state)
    with recorded(model.train()) as records:
        model(**batch)
    assert [sum(row) for row in counts(records)] == [batch["attention_mask"].sum() * 2] * 3


def test_embeddings_and_decoder() -> None:
    """The accessors that PEFT, TRL and generation go through lead into the dense model."""
    model = tiny()
    assert model.get_input_embeddings() is model.language_model.model.embed_tokens
    assert model.get_output_embeddings() is model.language_model.lm_head
    assert model.get_decoder() is model.language_model.model
    assert model.base_model.get_decoder() is model.language_model.model
    assert model.can_generate()
    assert not tiny(cls=MoEModel).can_generate()
    head = torch.nn.Linear(32, 128, bias=False)
    model.set_output_embeddings(head)
    assert model.language_model.lm_head is head
    embeddings = torch.nn.Embedding(128, 32)
    model.set_input_embeddings(embeddings)
    assert model.language_model.model.embed_tokens is embeddings
