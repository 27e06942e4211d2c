"""Checkpoints of `MoEForCausalLM`: round trips, names on disk, dtypes, the bare model, resized and tied embeddings, copies."""

import copy
import io
from pathlib import Path

import pytest
import torch
from tiny import largest_difference, padded_batch, tensors_on_disk, tiny, token_ids
from transformers import AutoModel, AutoModelForCausalLM

from hf_moe import MoEForCausalLM, MoEModel

# name: (dense family, fields of MoEConfig)
VARIANTS = {
    "llama": ("llama", {}),
    "tied": ("llama_tied", {"decoder_sparse_step": 2}),
    "biases": ("llama_biases", {"capacity_factor": 1.25}),
    "plain_experts": ("gpt2", {}),
    "ffn_of_loose_linears": ("opt", {}),
    "packed_ffn_shared_experts": ("phi3", {"num_shared_experts": 2, "use_shared_expert_gate": True}),
    "residual": ("gemma3", {"residual_moe": True, "router_type": "switch", "num_experts_per_tok": 1}),
    "pyramid_sigmoid": ("qwen3", {"router_type": "sigmoid", "num_experts": [4, 2, 3]}),
    "hierarchical": ("olmo2", {"router_type": "hierarchical", "n_group": 2, "topk_group": 2}),
}


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


@pytest.mark.parametrize("max_shard_size", ["20KB", "5GB"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str, max_shard_size: str, tmp_path: Path) -> None:
    family, fields = VARIANTS[variant]
    model = tiny(family, **fields)
    model.save_pretrained(tmp_path / "a", max_shard_size=max_shard_size)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1 or max_shard_size == "5GB"
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert type(loaded) is MoEForCausalLM
    assert not any(info.values()), info
    assert largest_difference(loaded.state_dict(), model.state_dict()) == 0.0
    assert all(getattr(loaded.config, field) == getattr(model.config, field) for field in {"num_experts", *fields})
    assert torch.equal(logits_of(loaded), logits_of(model))
    # a model that was loaded saves what one built from scratch saves
    loaded.save_pretrained(tmp_path / "b")
    assert largest_difference(tensors_on_disk(tmp_path / "b"), tensors_on_disk(tmp_path / "a")) == 0.0


@pytest.mark.parametrize(
    ("family", "ffn", "projections"),
    [
        ("llama", "model.layers.{}.mlp", ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]),
        ("llama_tied", "model.layers.{}.mlp", ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]),
        ("gpt2", "transformer.h.{}.mlp", [f"{p}.{w}" for p in ("plain_up_proj", "down_proj") for w in ("weight", "bias")]),
    ],
)
def test_names_on_disk(family: str, ffn: str, projections: list[str], tmp_path: Path) -> None:
    """The dense model's own names, plus one tensor per expert and projection, plus the routers."""
    model = tiny(family)
    AutoModelForCausalLM.from_config(model.config.text_config).save_pretrained(tmp_path / "dense")
    model.save_pretrained(tmp_path / "moe")
    expected = {name for name in tensors_on_disk(tmp_path / "dense") if ".mlp." not in name}
    for layer in range(3):
        expected.add(f"{ffn.format(layer)}.gate.weight")
        expected |= {f"{ffn.format(layer)}.experts.{i}.{projection}" for i in range(4) for projection in projections}
    assert set(tensors_on_disk(tmp_path / "moe")) == expected


def test_experts_on_disk(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    on_disk, experts = tensors_on_disk(tmp_path), model.moe_layers[1].experts
    for i in range(4):
        name = f"model.layers.1.mlp.experts.{i}."
        fused = torch.cat([on_disk[f"{name}gate_proj.weight"], on_disk[f"{name}up_proj.weight"]])
        assert torch.equal(fused, experts.gate_up_proj[i])
        assert torch.equal(on_disk[f"{name}down_proj.weight"], experts.down_proj[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["auto", "given"])
def test_low_precision(asked: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Experts follow the dtype, routers stay fp32 with the same values, on disk as well."""
    model = tiny(router_type="sigmoid")
    model.moe_layers[0].gate.e_score_correction_bias.normal_()
    routers = {name: value.clone() for name, value in model.state_dict().items() if ".gate." in name}
    (model.to(dtype) if asked == "auto" else model).save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto" if asked == "auto" else dtype)
    loaded.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
    for trip in (loaded, again):
        state = trip.state_dict()
        assert {value.dtype for name, value in state.items() if ".gate." not in name} == {dtype}
        assert all(state[name].dtype == torch.float32 and torch.equal(state[name], routers[name]) for name in routers)
    assert torch.equal(logits_of(again), logits_of(loaded))


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(device_map: str, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert largest_difference({k: v.cpu() for k, v in loaded.state_dict().items()}, model.state_dict()) == 0.0


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_bare_model(family: str, tmp_path: Path) -> None:
    """`MoEModel` reads the checkpoint of `MoEForCausalLM` and the reverse, but for an untied head."""
    model = tiny(family)
    model.save_pretrained(tmp_path / "lm")
    bare, info = AutoModel.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert type(bare) is MoEModel
    assert not any(info.values()), info
    hidden = bare(input_ids=token_ids()).last_hidden_state
    assert torch.equal(hidden, model(input_ids=token_ids(), output_hidden_states=True).hidden_states[-1])
    bare.save_pretrained(tmp_path / "bare")
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert set(info["missing_keys"]) == ({"language_model.lm_head.weight"} if family == "llama" else set())
    assert not info["unexpected_keys"]
    with torch.no_grad():
        back.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight)
    assert torch.equal(logits_of(back), logits_of(model))


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_resize_token_embeddings(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    before = logits_of(model)
    embeddings = model.resize_token_embeddings(140)
    assert embeddings.weight.shape == (140, 32)
    assert embeddings is model.get_input_embeddings()
    assert model.config.get_text_config().vocab_size == 140
    assert torch.equal(logits_of(model)[..., :128], before)
    assert (model.get_output_embeddings().weight is embeddings.weight) == (family != "llama")
    batch = padded_batch()
    batch["labels"][0, 3] = batch["input_ids"][0, 4] = 139
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert embeddings.weight.grad[139].abs().max() > 0
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded(**batch).loss, loss)
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == (family != "llama")


@pytest.mark.parametrize(("how", "checkpointing"), [("deepcopy", False), ("deepcopy", True), ("pickle", False)])
def test_copies(how: str, checkpointing: bool) -> None:
    """A copy computes the same, shares no memory, and trains.

    No model of Transformers can be pickled with gradient checkpointing on: it hangs a local function on the embeddings.
    """
    model = tiny(capacity_factor=1.0, router_z_loss_coef=0.1).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    model(**padded_batch()).loss.backward()  # the balance of a batch is under way
    model.zero_grad()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    loss = other(**padded_batch()).loss
    assert torch.equal(loss, model(**padded_batch()).loss)
    loss.backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert largest_difference(other.state_dict(), model.state_dict()) > 0
    assert not torch.equal(logits_of(other.eval()), logits_of(model.eval()))
