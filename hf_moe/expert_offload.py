# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Inference with models whose experts exceed memory: `from_pretrained(…, expert_offload="disk" | "cpu")`.

`"disk"`: the experts stay in the checkpoint and are read when a router chooses them. `"cpu"`: they are all in CPU memory, while
the model is on a GPU (with the model on the CPU that is plain loading). Either way a bounded cache on the model's device has
those that were used last, and a thread reads ahead; see `hf_moe.expert_cache`. Logits are those of
`experts_implementation="eager"`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from .checkpoint_files import FilePlan, beside, remove_old_shards
from .expert_cache import Weights
from .expert_files import SafetensorsFiles, TensorOnRequest
from .expert_reader import ExpertLayer
from .expert_store import CacheReport, ExpertStore, NotCopied
from .offload_options import OffloadOptions, one_device, parse_options, refuse_combinations
from .parameter_counts import Shape, count_parameters
from .record import current_record

_FINE = 32  # numbers of rows above it are rounded up to 3/4 of a power of two as well
_INFERENCE_ONLY = "A model with `expert_offload` is for inference. To train it, load it without `expert_offload`."


class OffloadedExperts(nn.Module):
    """What stands in the place of `Experts`: no parameters, the same arithmetic as their plain loop.

    Args:
        experts: whose activation is taken over.
        store: has the weights.
        index: of the MoE layer.
        routers: of all MoE layers; those of the next ones predict what to read ahead.
    """

    weights_like: Tensor

    def __init__(self, experts: Any, store: ExpertStore, index: int, routers: list[nn.Module]) -> None:
        super().__init__()
        self.config, self.num_experts = experts.config, experts.num_experts
        self.has_gate, self.has_bias, self.act_fn = experts.has_gate, experts.has_bias, experts.act_fn
        self._apply_gate: Callable[[Tensor], Tensor] = type(experts)._apply_gate.__get__(self)
        self.store, self.index = store, index
        self._routers = tuple(routers)  # a tuple, so that they are no children of this module
        # follows the model to another device or dtype
        self.register_buffer("weights_like", torch.empty(0, dtype=experts.down_proj.dtype), persistent=False)

    def allow_empty_slots(self) -> None:
        """Slots that hold the id E are always skipped."""

    def reset_parameters(self, std: float = 0.02) -> None:
        """Nothing to draw."""

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `Experts.loop`. One expert at a time, so that the cache may be smaller than what the batch needs.

        Raises:
            ValueError: a gradient would be needed.
        """
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            raise ValueError(f"{_INFERENCE_ONLY} (Or: the forward is under gradients; run it under `torch.no_grad()`.)")
        cache = self.store.cache(self.weights_like.dtype, hidden_states.device)
        output_TD = torch.zeros_like(hidden_states)
        needed = [expert for expert in top_k_index.unique().tolist() if expert < self.num_experts]
        ids_KT = top_k_index.t()  # rows in the order of the plain loop
        with cache.layer([(self.index, expert) for expert in needed], self.store.options.prefetch > 0) as use:
            cache.prefetch(self._predicted(hidden_states))
            for expert in needed:
                slot, token = torch.where(ids_KT == expert)
                with use((self.index, expert)) as weights:
                    rows = self._expert(weights, hidden_states[token])
                output_TD.index_add_(0, token, (rows * top_k_weights[token, slot, None]).to(output_TD.dtype))
        return output_TD

    def _expert(self, weights: Weights, x: Tensor) -> Tensor:
        def linear(rows: Tensor, name: str) -> Tensor:
            return nn.functional.linear(rows, weights[name], weights.get(f"{name}_bias"))

        num_rows = x.shape[0]
        x = _in_few_sizes(x)
        hidden = linear(x, "gate_up_proj" if self.has_gate else "up_proj")
        return linear(self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden), "down_proj")[:num_rows]

    @torch.no_grad()
    def _predicted(self, x_TD: Tensor) -> list[tuple[int, int]]:
        """The experts that the next layers are expected to choose, the most wanted of each layer first."""
        found: list[tuple[int, int]] = []
        cache = self.store.cache(self.weights_like.dtype, x_TD.device)
        for index in range(self.index + 1, min(self.index + 1 + self.store.options.prefetch, len(self._routers))):
            num_experts = self.store.layers[index].num_experts
            if cache.holds_layer(index, num_experts):
                continue
            ids_TK = _choice(self._routers[index], x_TD)
            if ids_TK is not None:
                wanted_E = torch.bincount(ids_TK.flatten(), minlength=num_experts + 1)[:num_experts].tolist()
                order = sorted(range(num_experts), key=lambda expert: -wanted_E[expert])
                found += [(index, expert) for expert in order if wanted_E[expert]]
        return found

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, place={self.store.options.place!r}"


def _in_few_sizes(x: Tensor) -> Tensor:
    """The rows, and zeros after them where the CPU's matrix library keeps a kernel for every number of rows (0.75 MB each)."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x
    power = 1 << max(0, x.shape[0] - 1).bit_length()
    size = power * 3 // 4 if power > _FINE and x.shape[0] <= power * 3 // 4 else power
    return nn.functional.pad(x, (0, 0, 0, size - x.shape[0])) if size > x.shape[0] else x


def _without_gaps(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Of one token, cut from a prompt: torch does not see that it is a matrix, and would copy the whole head to multiply it."""
    x = inputs[0] if inputs else None
    if isinstance(x, Tensor) and x.shape[:-1].numel() == 1:
        return (x.clone(memory_format=torch.contiguous_format), *inputs[1:])
    return None


def _choice(router: nn.Module, x_TD: Tensor) -> Tensor | None:
    """`[T, K]` the experts that a router would choose for the tokens of another layer."""
    record = current_record()
    ids_T = None if record is None or record.input_ids is None else record.input_ids.reshape(-1)
    if ids_T is not None and ids_T.shape[0] != x_TD.shape[0]:
        ids_T = None
    if ids_T is None and next(router.parameters(), None) is None:  # routes by token id
        return None
    return router(x_TD, None, ids_T).expert_ids_TK


class ExpertOffloadMixin(NotCopied):
    """What a model with offloaded experts does otherwise. The class of such a model is this and the model's own."""

    offload_options: OffloadOptions
    plain_class: Any
    expert_store: ExpertStore

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("`expert_offload` cannot read a quantised checkpoint. Give one in fp32, bf16 or fp16.")
        initialise: Any = super().__init__
        initialise(config, *args, **kwargs)
        model: Any = self
        moe_layers = set(model.moe_layers)
        if not moe_layers:
            raise ValueError("`expert_offload` needs a model with MoE layers, but this one has none. Leave it out.")
        layers = [(name, module) for name, module in model.named_modules() if module in moe_layers]
        found = []
        for name, layer in layers:
            shapes = {key: tuple(p.shape[1:]) for key, p in layer.experts.named_parameters(recurse=False)}
            found.append(ExpertLayer(f"{name}.experts", layer.num_experts, shapes))
        dtype = layers[0][1].experts.down_proj.dtype
        experts = sum(layer.num_parameters for layer in found)
        weights = sum(p.nbytes for p in model.parameters()) - experts * dtype.itemsize
        self.expert_store = ExpertStore(found, self.offload_options, dtype, weights)
        routers = [layer.gate for _, layer in layers]
        for index, (_, layer) in enumerate(layers):
            layer.experts = OffloadedExperts(layer.experts, self.expert_store, index, routers)
        head = model.get_output_embeddings()
        if isinstance(head, nn.Linear):
            head.register_forward_pre_hook(_without_gaps)

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any) -> Any:
        """See `PreTrainedModel`: here, all but the experts are loaded."""
        if not checkpoint_files or not all(str(path).endswith(".safetensors") for path in checkpoint_files):
            raise ValueError("`expert_offload` reads safetensors files. Load the model without it and `save_pretrained` it.")
        files = SafetensorsFiles(checkpoint_files)
        names = model.expert_store.open(files, load_config.weight_mapping)
        own = model.state_dict()
        kept_plan = load_config.dtype_plan or {}
        kept = build_glob_alternation(list(kept_plan))[0] if kept_plan else None
        others = {}
        for key, name in names.items():
            stored = files.tensors[key]
            as_stored = name not in own or not stored.dtype.is_floating_point or (kept and kept.search(name))
            others[key] = TensorOnRequest(files, stored, stored.dtype if as_stored else own[name].dtype)
        loaded = PreTrainedModel._load_pretrained_model(model, others, checkpoint_files, load_config, *args)
        model.expert_store.hold()
        return loaded

    def expert_cache_stats(self) -> CacheReport:
        """Hits, misses, hits of the prefetch and bytes read, of the model and of each MoE layer; see `CacheStats`."""
        return self.expert_store.report()

    def close_experts(self) -> None:
        """Close the checkpoint and free the cache. It happens by itself when the model is collected."""
        self.expert_store.close()

    def train(self, mode: bool = True) -> Any:
        """Refused: the model is for inference."""
        if mode:
            raise ValueError(_INFERENCE_ONLY)
        model: Any = super()
        return model.train(False)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """See `PreTrainedModel.num_parameters`; the experts count."""
        model: Any = super()
        experts = sum(layer.num_parameters for layer in self.expert_store.layers)
        return model.num_parameters(only_trainable, exclude_embeddings) + (0 if only_trainable else experts)

    def num_active_parameters(self, exclude_embeddings: bool = False) -> int:
        """See `MoEPreTrainedModel.num_active_parameters`."""
        model: Any = self
        shapes = [Shape(name, tuple(p.shape)) for name, p in model.named_parameters()]
        for layer in self.expert_store.layers:
            shapes += [Shape(f"{layer.path}.{name}", (layer.num_experts, *s)) for name, s in layer.shapes.items()]
        counts = count_parameters(shapes, model.config.to_dict())
        return self.num_parameters(exclude_embeddings=exclude_embeddings) - counts.total + (counts.active or counts.total)

    def save_pretrained(
        self,
        save_directory: str | Path,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        save_original_format: bool = True,
        **kwargs: Any,
    ) -> None:
        """See `PreTrainedModel.save_pretrained`. Experts are read and written one projection of a layer at a time.

        Raises:
            ValueError: another argument is given.
        """
        if kwargs:
            raise ValueError(
                f"`{next(iter(kwargs))}` cannot be given with `expert_offload`. Save without it; to upload, upload the folder."
            )
        model: Any = self
        own, dtype = model.state_dict(), model.moe_layers[0].experts.weights_like.dtype
        stacks = {f"{x.path}.{n}": (i, n) for i, x in enumerate(self.expert_store.layers) for n in x.shapes}
        with torch.device("meta"):
            twin = self.plain_class(model.config)
        dtypes = {**{name: tensor.dtype for name, tensor in own.items()}, **dict.fromkeys(stacks, dtype)}
        plan = FilePlan(twin, dtypes, max_shard_size, save_original_format, variant)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with beside(folder) as target:
            whole: Any = super()
            whole.save_pretrained(target, state_dict={})  # configs and code
            fetch = self.expert_store.stacked
            plan.write(lambda name: fetch(*stacks[name], dtype) if name in stacks else own[name], target)
        remove_old_shards(folder, plan)


def load_offloaded(cls: Any, options: Mapping[str, Any], path: Any, *args: Any, **kwargs: Any) -> Any:
    """`cls.from_pretrained` with the experts offloaded.

    Args:
        cls: `MoEForCausalLM` or `MoEModel`.
        options: `expert_offload`, and optionally `expert_cache_size` and `expert_prefetch`.
        path, args, kwargs: what else `from_pretrained` takes. `max_memory` is a bound on all weights on the model's device.

    Raises:
        ValueError: an option has no meaning, or an argument cannot be combined with them.
    """
    refuse_combinations(kwargs)
    device = one_device(kwargs.get("device_map"))
    parsed = parse_options(options, kwargs.pop("max_memory", None), device)
    members = {"offload_options": parsed, "plain_class": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    offloaded: Any = type(cls.__name__, (ExpertOffloadMixin, cls), members)
    loaded = offloaded.from_pretrained(path, *args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.requires_grad_(False)  # so that a forward outside `torch.no_grad()` is one for inference as well
    return loaded


__all__ = ["ExpertOffloadMixin", "OffloadedExperts", "load_offloaded"]
