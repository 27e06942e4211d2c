# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The dispatchers by name, registered with Transformers, and how `auto` chooses among them."""

from __future__ import annotations

from transformers.distributed.expert_parallel import EPImplementationInterface

from .dispatch_all_to_all import AllToAllDispatcher
from .dispatch_base import ExpertDispatcher
from .dispatch_capacity import CapacityDispatcher
from .dispatch_chunked import ChunkedDispatcher
from .dispatch_deduplicated import DeduplicatedDispatcher
from .dispatch_hierarchical import HierarchicalDispatcher

DISPATCHERS: dict[str, type[ExpertDispatcher]] = {
    "all_to_all": AllToAllDispatcher,
    "deduplicated": DeduplicatedDispatcher,
    "capacity": CapacityDispatcher,
    "hierarchical": HierarchicalDispatcher,
    "chunked": ChunkedDispatcher,
}


def register_dispatchers() -> None:
    """Make them known to Transformers as `hf_moe_<name>`."""
    for name, dispatcher in DISPATCHERS.items():
        EPImplementationInterface.register(f"hf_moe_{name}", dispatcher)


def ep_implementation(dispatcher: str, **settings: int | bool | None) -> str:
    """The name under which Transformers finds a dispatcher with settings (`DistributedConfig(ep_implementation=…)`).

    Args:
        dispatcher: a name of `DISPATCHERS`.
        settings: of its class (`ranks_per_node`, `chunk_rows`, `equal_batches`); those it has not, and `None`, are left out.

    Raises:
        ValueError: there is no such dispatcher.

    Example:
        >>> ep_implementation("hierarchical", ranks_per_node=8, chunk_rows=None)
        'hf_moe_hierarchical_ranks_per_node_8'
    """
    if dispatcher not in DISPATCHERS:
        raise ValueError(f"`dispatcher`={dispatcher!r} is unknown: use one of {', '.join(map(repr, DISPATCHERS))}.")
    base = DISPATCHERS[dispatcher]
    own = {name: value for name, value in settings.items() if value is not None and hasattr(base, name)}
    name = "_".join([f"hf_moe_{dispatcher}", *(f"{setting}_{value}" for setting, value in sorted(own.items()))])
    EPImplementationInterface.register(name, type(base.__name__, (base,), own) if own else base)
    return name


def rows_per_token(num_ranks: int, num_experts: int, top_k: int) -> float:
    """Ranks that hold an expert of a token, on average, if each set of K experts is as likely (experts spread evenly).

    Example:
        >>> round(rows_per_token(num_ranks=4, num_experts=128, top_k=8), 2)  # where 8 pairs are sent otherwise
        3.63
    """
    others = num_experts - num_experts / num_ranks
    none_here = 1.0
    for drawn in range(top_k):
        none_here *= max(0.0, others - drawn) / (num_experts - drawn)
    return num_ranks * (1 - none_here)


def choose_dispatcher(
    *,
    ep_size: int,
    num_experts: int,
    top_k: int,
    capacity: float | None = None,
    num_nodes: int = 1,
    ranks_per_node: int | None = None,
    bounded_memory: bool = False,
) -> tuple[str, str]:
    """The dispatcher that `auto` takes, and why.

    Args:
        ep_size: ranks of an expert group.
        num_experts: E of a layer.
        top_k: K.
        capacity: the capacity factor; `None` if dropless.
        num_nodes: nodes that an expert group reaches over.
        ranks_per_node: ranks of a node, where an expert group might not be made of whole nodes.
        bounded_memory: whether no routing may need more memory than another.

    Returns:
        A name of `DISPATCHERS` and one sentence.

    Example:
        >>> choose_dispatcher(ep_size=4, num_experts=128, top_k=8)
        ('deduplicated', 'a token needs 3.6 of 4 ranks on average, where 8 (token, expert) pairs would be sent.')
    """
    rows = rows_per_token(ep_size, num_experts, top_k)
    if bounded_memory:
        return "chunked", "memory is to be bounded whatever the routing, so rows travel in rounds."
    if ep_size == 1:
        return "all_to_all", "every rank holds all experts, so nothing travels."
    whole_nodes = ep_size % (ranks_per_node or num_nodes) == 0
    if num_nodes > 1 and ep_size > num_nodes and whole_nodes:
        return "hierarchical", f"an expert group reaches over {num_nodes} nodes, and a token crosses once to each."
    if capacity is not None:
        buffers = ep_size * min(1.0, capacity * top_k / ep_size)
        if buffers <= 1.25 * rows:
            return (
                "capacity",
                f"buffers that fit the capacity have {buffers:.1f} rows per token, of which {rows:.1f} are needed.",
            )
    if rows <= 0.9 * top_k:
        needs = f"a token needs {rows:.1f} of {ep_size} ranks on average"
        return "deduplicated", f"{needs}, where {top_k} (token, expert) pairs would be sent."
    return "all_to_all", f"a token needs {rows:.1f} ranks for {top_k} experts, so there is little to deduplicate."
