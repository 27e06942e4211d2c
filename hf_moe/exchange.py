# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Rows that travel between the ranks of a group: an all-to-all in two steps, and a count of what is sent.

`Exchange.start` sends and `Travelling.wait` receives, so that other work fits in between, in the backward as well: there the
gradients start to travel where the forward waited, and are waited for where it started.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Exchange:
    """An all-to-all of rows.

    Attributes:
        group: the ranks.
        send_sizes: rows for each rank of the group, in whose order they lie.
        receive_sizes: rows from each rank.
        what: what the rows are, for messages.
    """

    group: ProcessGroup
    send_sizes: tuple[int, ...]
    receive_sizes: tuple[int, ...]
    what: str

    def back(self, what: str) -> Exchange:
        """The same ways in the other direction."""
        return Exchange(self.group, self.receive_sizes, self.send_sizes, what)

    def named(self, what: str) -> Exchange:
        """The same ways for something else that has one entry per row."""
        return Exchange(self.group, self.send_sizes, self.receive_sizes, what)

    def times(self, factor: int, what: str) -> Exchange:
        """The same ways for another load of `factor` entries per row."""
        send, receive = (tuple(factor * size for size in sizes) for sizes in (self.send_sizes, self.receive_sizes))
        return Exchange(self.group, send, receive, what)

    def start(self, rows: Tensor) -> Travelling:
        """Send rows `[sum(send_sizes), ...]`; returns before they have arrived. Differentiable.

        Raises:
            RuntimeError: the exchange failed, usually because another rank did.
        """
        returning: list[Tensor] = []
        return Travelling(_Start.apply(rows, self, returning), self, returning)

    def send(self, rows: Tensor) -> Tensor:
        """Start without autograd; `receive` has to follow."""
        with failing_as(self.what, self.group):
            return torch.ops._c10d_functional.all_to_all_single(
                rows.contiguous(), self.receive_sizes, self.send_sizes, self.group.group_name
            )

    def receive(self, pending: Tensor) -> Tensor:
        """Wait for what `send` returned."""
        with failing_as(self.what, self.group):
            return torch.ops._c10d_functional.wait_tensor(pending)


@dataclass(frozen=True)
class Travelling:
    """Rows under way; `wait` for them once.

    Attributes:
        pending: what arrives.
        exchange: the ways.
        returning: in the backward, the gradient under way.
    """

    pending: Tensor
    exchange: Exchange
    returning: list[Tensor]

    def wait(self) -> Tensor:
        """The rows received, `[sum(receive_sizes), ...]`."""
        return _Wait.apply(self.pending, self.exchange, self.returning)


class _Start(torch.autograd.Function):
    """Send; in the backward wait for the gradient that `_Wait` has sent."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange, returning: list[Tensor]) -> Tensor:
        ctx.exchange, ctx.returning = exchange, returning
        return exchange.send(rows)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        back = ctx.exchange.back(f"the gradient of {ctx.exchange.what}")
        return back.receive(ctx.returning.pop()), None, None


class _Wait(torch.autograd.Function):
    """Wait; in the backward send the gradient to where the rows came from."""

    @staticmethod
    def forward(ctx: Any, pending: Tensor, exchange: Exchange, returning: list[Tensor]) -> Tensor:
        ctx.exchange, ctx.returning = exchange, returning
        return exchange.receive(pending)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        back = ctx.exchange.back(f"the gradient of {ctx.exchange.what}")
        ctx.returning.append(back.send(grad))
        # autograd wants a gradient of the shape of what arrived, and `_Start` does not look at it
        return grad.new_zeros(()).expand_as(grad), None, None


def swap(values: Tensor, group: ProcessGroup, what: str) -> Tensor:
    """`[R, ...]`, one entry for each rank of the group, to one entry from each. Not differentiable."""
    ones = (1,) * group.size()
    exchange = Exchange(group, ones, ones, what)
    return exchange.receive(exchange.send(values))


@contextmanager
def failing_as(what: str, group: ProcessGroup) -> Iterator[None]:
    """Say of a collective's error what was exchanged and who waits."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"Rank {dist.get_rank()} could not exchange {what} with ranks {dist.get_process_group_ranks(group)}: "
            f"another rank has failed; see its message above. ({str(error).splitlines()[0]})"
        ) from error


@dataclass
class Sent:
    """What this rank sent by one kind of collective.

    Attributes:
        calls: collectives.
        rows: rows to other ranks: entries of the first dimension of all-to-alls of floating-point matrices.
        rows_across: of these, to other nodes.
        bytes: to other ranks, metadata included.
        bytes_across: of these, to other nodes.
        total_rows: with those to itself.
        total_bytes: with those to itself.
    """

    calls: int = 0
    rows: int = 0
    rows_across: int = 0
    bytes: float = 0
    bytes_across: float = 0
    total_rows: int = 0
    total_bytes: float = 0

    @property
    def bytes_inside(self) -> float:
        """To other ranks of the own node."""
        return self.bytes - self.bytes_across


@dataclass
class Traffic:
    """What this rank sent inside a `count_traffic` block, backward included.

    An all-to-all is counted exactly. Of the others, which leave the way to the backend, each rank is taken to send every
    other what that one needs: an all-gather its shard, a reduce-scatter the other's shard, an all-reduce both, a broadcast
    the tensor (by its source).

    Attributes:
        ranks_per_node: global ranks of a node; `None` if all are on one.
        kinds: by kind: `"all_to_all"`, `"all_gather"`, `"reduce_scatter"`, `"all_reduce"`, `"broadcast"`.
        uncounted: calls of other collectives, by the operator's name.
    """

    ranks_per_node: int | None = None
    kinds: dict[str, Sent] = field(default_factory=dict)
    uncounted: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> Sent:
        """Over all kinds."""
        names = Sent.__dataclass_fields__
        return Sent(**{name: sum(getattr(sent, name) for sent in self.kinds.values()) for name in names})

    @property
    def rows(self) -> int:
        """Rows to other ranks."""
        return self.total.rows

    @property
    def bytes(self) -> float:
        """Bytes to other ranks."""
        return self.total.bytes

    def add(self, kind: str, group: ProcessGroup, bytes_R: list[float], rows_R: list[int]) -> None:
        """Called for each collective with what goes to each rank of its group."""
        sent = self.kinds.setdefault(kind, Sent())
        sent.calls += 1
        sent.total_rows += sum(rows_R)
        sent.total_bytes += sum(bytes_R)
        me = dist.get_rank()
        for rank, size, rows in zip(dist.get_process_group_ranks(group), bytes_R, rows_R, strict=True):
            if rank != me:
                across = self.ranks_per_node is not None and rank // self.ranks_per_node != me // self.ranks_per_node
                sent.bytes, sent.bytes_across = sent.bytes + size, sent.bytes_across + across * size
                sent.rows, sent.rows_across = sent.rows + rows, sent.rows_across + across * rows


@contextmanager
def count_traffic(ranks_per_node: int | None = None) -> Iterator[Traffic]:
    """Count what this rank sends inside the block, whoever sends it (Transformers, FSDP, DTensor, us).

    Args:
        ranks_per_node: to tell links inside a node from those across; global ranks of a node are consecutive.

    Example:
        >>> with count_traffic() as traffic:
        ...     pass  # forward, backward
        >>> traffic.rows, traffic.bytes
        (0, 0)
    """
    traffic = Traffic(ranks_per_node)
    with _CountingMode(traffic):
        yield traffic


# operator: kind, position of what is sent, position of the group
_OPERATORS = {
    "_c10d_functional::all_to_all_single": ("all_to_all", 0, 3),
    "c10d::alltoall_base_": ("all_to_all", 1, 2),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 0, 2),
    "_c10d_functional::all_gather_into_tensor_out": ("all_gather", 0, 2),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", 0, 2),
    "c10d::_allgather_base_": ("all_gather", 1, 2),
    "c10d::allgather_": ("all_gather", 1, 2),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 1, 2),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0, 3),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", 0, 3),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, 2),
    "_c10d_functional::all_reduce": ("all_reduce", 0, 2),
    "_c10d_functional::all_reduce_": ("all_reduce", 0, 2),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", 0, 2),
    "c10d::allreduce_": ("all_reduce", 0, 1),
    "c10d::allreduce_coalesced_": ("all_reduce", 0, 1),
    "_c10d_functional::broadcast": ("broadcast", 0, 2),
    "_c10d_functional::broadcast_": ("broadcast", 0, 2),
    "c10d::broadcast_": ("broadcast", 0, 1),
}
_SPLITS = {"_c10d_functional::all_to_all_single": 2, "c10d::alltoall_base_": 4}
_SOURCES = {"_c10d_functional::broadcast": 1, "_c10d_functional::broadcast_": 1, "c10d::broadcast_": 2}
_SILENT = ("wait_tensor", "wrap_tensor", "barrier", "recv", "check_for_nan")


class _CountingMode(TorchDispatchMode):
    """Sees every collective, below autograd."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it comes again as operators on local tensors and collectives
        name = func._schema.name
        if name in _OPERATORS:
            self._count(name, args)
        elif func.namespace in ("c10d", "_c10d_functional") and not any(part in name for part in _SILENT):
            self.traffic.uncounted[name] += 1
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        kind, sent_at, group_at = _OPERATORS[name]
        group = _group(args[group_at])
        tensors = args[sent_at] if isinstance(args[sent_at], (list, tuple)) else [args[sent_at]]
        ranks = group.size()
        if kind == "all_to_all":
            rows = tensors[0]
            sizes = list(args[_SPLITS[name]]) or [rows.shape[0] // ranks] * ranks
            row_bytes = rows[:1].nbytes if rows.shape[0] else 0
            is_payload = rows.dim() > 1 and rows.is_floating_point()
            self.traffic.add(kind, group, [size * row_bytes for size in sizes], sizes if is_payload else [0] * ranks)
            return
        size = sum(tensor.nbytes for tensor in tensors)
        shares = {"all_gather": 1.0, "reduce_scatter": 1 / ranks, "all_reduce": 2 / ranks}
        share = shares[kind] if kind in shares else float(args[_SOURCES[name]] == group.rank())
        self.traffic.add(kind, group, [size * share] * ranks, [0] * ranks)


def _group(handle: Any) -> ProcessGroup:
    """From a name, a group, or the box in which operators pass one."""
    if isinstance(handle, str):
        return _resolve_process_group(handle)  # type: ignore[arg-type]
    return handle if isinstance(handle, ProcessGroup) else ProcessGroup.unbox(handle)
