"""`torch.compile` of the whole forward, in one graph, gives the same outputs and gradients."""

import pytest
import torch
from tiny import gradients, largest_difference, padded_batch, tiny, token_ids

ROUTERS = {
    "top_k_capacity": {"capacity_factor": 0.8, "eval_capacity_factor": 0.8, "router_z_loss_coef": 0.1},
    "noisy_top_k": {"router_type": "noisy_top_k", "router_importance_loss_coef": 0.1},
    "gshard": {"router_type": "gshard"},
    "hierarchical": {"router_type": "hierarchical", "n_group": 2, "topk_group": 2},
    "expert_choice": {"router_type": "expert_choice", "allow_non_causal": True},
}


@pytest.fixture(autouse=True)
def forget_compiled_code() -> None:
    torch._dynamo.reset()


def one_layer(**fields: object) -> torch.nn.Module:
    """With the experts that run in compiled code, also when it is not compiled: "hf_moe" leaves that to "grouped_mm"."""
    model = tiny("llama", text={"num_hidden_layers": 1}, **fields)
    model.set_experts_implementation("grouped_mm")
    return model


@pytest.mark.parametrize(
    ("router", "training"),
    [("top_k_capacity", False), ("top_k_capacity", True), ("noisy_top_k", True), ("gshard", True), ("hierarchical", True),
     ("expert_choice", True)],
)  # fmt: skip
def test_one_graph(router: str, training: bool) -> None:
    """`fullgraph=True` allows no graph break; backend "eager" runs the same kernels, so all is equal bit by bit."""
    model = one_layer(**ROUTERS[router]).train(training)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for seed in range(2):  # the second call must not be the first one's again
        batch = padded_batch(seed=seed)
        found = {}
        for name, run in {"plain": model, "compiled": compiled}.items():
            torch.manual_seed(seed)
            outputs = run(**batch, output_router_logits=True)
            model.zero_grad()
            outputs.loss.backward()
            values = {k: v.detach() for k, v in outputs.items() if isinstance(v, torch.Tensor)}
            found[name] = values | gradients(model)
        assert largest_difference(found["compiled"], found["plain"]) == 0.0


def test_gradient_checkpointing() -> None:
    """With graph breaks: a checkpoint in one graph may have no side effects, and a record is one."""
    model = one_layer(router_type="noisy_top_k", router_z_loss_coef=0.1).train()
    model.activation_checkpointing_enable()
    found = []
    for run in (model, torch.compile(model, backend="eager")):
        torch.manual_seed(0)
        model.zero_grad()
        run(**padded_batch(), use_cache=False).loss.backward()
        found.append(gradients(model))
    assert largest_difference(*found) == 0.0


def test_inductor() -> None:
    """Real kernels, in training."""
    model = one_layer(router_z_loss_coef=0.1).train()
    batch = padded_batch()
    found = {}
    for name, run in {"plain": model, "compiled": torch.compile(model)}.items():
        model.zero_grad()
        outputs = run(**batch)
        outputs.loss.backward()
        found[name] = outputs, gradients(model)
    (outputs, got), (expected, wanted) = found["compiled"], found["plain"]
    for name in ("logits", "loss", "aux_loss", "z_loss", "importance_loss"):
        # fused kernels round otherwise
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-5)
    assert largest_difference(got, wanted) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_generation(family: str) -> None:
    """A static cache, as `generate` compiles it on a GPU: one graph for the prompt, one for all new tokens."""
    model, ids = tiny(family, text={"num_hidden_layers": 2}), token_ids()
    ids[1, :4] = 0
    arguments = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static", "eos_token_id": None}
    arguments["attention_mask"] = (ids != 0).long()
    expected = model.generate(ids, **arguments)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=4):
        assert torch.equal(model.generate(ids, **arguments), expected)
