"""Worker: experts that change places between expert-parallel ranks, against the same training without a move.

Run by test_expert_placement.py under torchrun: `placement_worker.py FOLDER JOBS`, where JOBS is a JSON list of {"name", "ep",
"dense", "dispatcher", "optimizer", "native", "fields" of MoEConfig, "moves": by step, then by layer, the new slots}, or of
{"name", "trainer": true, "ep", "fields", "callback": arguments or null, "steps"}. Rank 0 writes FOLDER/NAME/result.json; it
is compared with the same training without moves.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import text_config
from hf_moe.training import MoETrainer
from hf_moe.training.placement import ExpertPlacementCallback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trainer_cut import NUM_SEQUENCES, collate, sequences
from transformers import MixtralConfig, MixtralForCausalLM, TrainingArguments

from hf_moe import MoEConfig, MoEForCausalLM
from hf_moe.expert_parallel import load_expert_parallel
from hf_moe.expert_placement import current_placement, expert_layers, move_experts, unplaced

STEPS = 4
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "adamw_foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def build(folder: Path, native: bool = False, skew: float = 0.0, **fields: Any) -> None:
    """A checkpoint; `skew` has the first experts of each layer chosen more often."""
    torch.manual_seed(0)
    if native:
        config = MixtralConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
        )  # fmt: skip
        MixtralForCausalLM(config).save_pretrained(folder)
        return
    family = fields.pop("family", "llama")
    model = MoEForCausalLM(MoEConfig(text_config=text_config(family, initializer_range=0.2), **{"num_experts": 4, **fields}))
    for layer in model.moe_layers if skew else []:
        bias = layer.gate.e_score_correction_bias
        bias += skew * torch.linspace(1, 0, bias.numel())
    model.save_pretrained(folder)


def load(folder: Path, job: dict[str, Any]) -> Any:
    dense = job.get("dense", "fsdp")
    copies = {"dp_replicate_size": 2} if dense == "hybrid" else {}
    dispatcher = job.get("dispatcher", "all_to_all")
    return load_expert_parallel(folder, ep_size=job["ep"], dense=dense, dispatcher=dispatcher, quiet=True, **copies)


def whole(model: nn.Module, pick: Any = lambda parameter: parameter) -> dict[str, Tensor]:
    """What `pick` finds of every parameter, gathered, experts in the order of their numbers."""
    slots = {id(p): e.slot_of_expert for e in expert_layers(model).values() for p in e.parameters() if moved(e)}
    found = {}
    for name, parameter in model.named_parameters():
        value = pick(parameter)
        if value is not None:
            value = value.full_tensor() if isinstance(value, DTensor) else value
            found[name] = unplaced(value.detach().clone(), slots.get(id(parameter)))
    return found


def moved(experts: Any) -> bool:
    return getattr(experts, "slot_of_expert", None) is not None


def train(model: nn.Module, job: dict[str, Any], moves: dict[str, dict[str, list[int]]]) -> dict[str, Any]:
    """`STEPS` steps; before step s the moves of s are made. What is kept is in the order of experts."""
    world, rank = dist.get_world_size(), dist.get_rank()
    ids = torch.randint(3, 128, (STEPS, 8, 9), generator=torch.Generator().manual_seed(3))
    optimizer = OPTIMIZERS[job.get("optimizer", "adamw")](model.parameters())
    objects = [id(parameter) for parameter in model.parameters()]
    losses, gradients, count = [], {}, 0
    for step in range(STEPS):
        for layer, slots in moves.get(str(step), {}).items():
            count += move_experts(model, optimizer, int(layer), slots)
        mine = ids[step].chunk(world)[rank]
        loss = model(input_ids=mine, labels=mine, num_items_in_batch=8 * 8).loss * world
        loss.backward()
        if step == STEPS - 2:
            for layer, slots in moves.get("in_backward", {}).items():  # gradients go along
                move_experts(model, optimizer, int(layer), slots)
            gradients = whole(model, lambda parameter: parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / world
        dist.all_reduce(total)
        losses.append(total.item())
    assert objects == [id(parameter) for parameter in model.parameters()]
    first = {"adamw": "exp_avg_sq", "adamw_foreach": "exp_avg_sq", "sgd": "momentum_buffer"}[job.get("optimizer", "adamw")]
    moments = whole(model, lambda parameter: optimizer.state[parameter].get(first))
    return {"losses": losses, "gradients": gradients, "moments": moments, "weights": whole(model), "moved": count}


def gap(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of each tensor."""
    assert got.keys() == expected.keys()
    assert len(got) > 10
    return max(((got[k] - v).abs().max() / v.abs().max().clamp(min=1e-8)).item() for k, v in expected.items())


def compare(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    if dist.get_rank() == 0:
        build(folder / "model", job.get("native", False), **job.get("fields", {}))
    dist.barrier()
    still = train(load(folder / "model", job), job, {})
    model = load(folder / "model", job)
    before = whole(model)
    got = train(model, job, job["moves"])
    return {
        "losses": max(abs(one - other) for one, other in zip(got["losses"], still["losses"], strict=True)),
        **{name: gap(got[name], still[name]) for name in ("gradients", "moments", "weights")},
        "trained": gap(got["weights"], before),
        "moved": got["moved"],
        "placement": current_placement(model),
        "local_experts": [experts.num_experts for experts in expert_layers(model).values()],
        "errors": errors(model),
    }


def errors(model: nn.Module) -> list[str]:
    """What is said of moves that cannot be made; none of them moves anything."""
    size = len(next(iter(current_placement(model).values())))
    odd = torch.optim.AdamW(model.parameters())
    for parameter in expert_layers(model)[0].parameters():
        odd.state[parameter] = {"rows": torch.zeros(size, 3)}
    found = []
    for optimizer, layer, slots in ((None, 7, range(size)), (None, 0, [0] * size), (odd, 0, range(size))):
        try:
            move_experts(model, optimizer, layer, slots)
        except ValueError as error:
            found.append(str(error))
    name, model.config.distributed_config.ep_implementation = model.config.distributed_config.ep_implementation, "all_to_all"
    try:
        move_experts(model, None, 0, range(size))
    except ValueError as error:
        found.append(str(error))
    model.config.distributed_config.ep_implementation = name
    return found


def run_trainer(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Some steps of `MoETrainer` with and without the callback."""
    if dist.get_rank() == 0:
        build(folder / "model", **job["fields"])
    dist.barrier()
    found: dict[str, Any] = {}
    for name, arguments in (("still", None), ("moved", job["callback"])):
        callback = None if arguments is None else ExpertPlacementCallback(**arguments)
        model = load(folder / "model", job)
        args = TrainingArguments(
            output_dir=str(folder / name), use_cpu=True, max_steps=job["steps"], logging_steps=2, save_strategy="no",
            report_to="none", disable_tqdm=True, learning_rate=1e-3, gradient_accumulation_steps=2,
            per_device_train_batch_size=NUM_SEQUENCES // 2 // dist.get_world_size(),
        )  # fmt: skip
        callbacks = [] if callback is None else [callback]
        trainer = MoETrainer(model, args, train_dataset=sequences(), data_collator=collate, callbacks=callbacks)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            trainer.train()
        logs = [row for row in trainer.state.log_history if "loss" in row]
        weights = whole(trainer.model)
        found[name] = {"logs": logs, "printed": printed.getvalue(), "placement": current_placement(model)}
        found.setdefault("weights", weights)
    found["gap"] = gap(weights, found.pop("weights"))
    found["state"] = len(json.dumps(callback.state())) if callback is not None else 0
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for each in json.loads(sys.argv[2]):
        place = Path(sys.argv[1]) / each["name"]
        place.mkdir(exist_ok=True)
        result = run_trainer(place, each) if each.get("trainer") else compare(place, each)
        if dist.get_rank() == 0:
            (place / "result.json").write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()
