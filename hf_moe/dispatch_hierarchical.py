# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Two levels: a token crosses once to each other node that needs it, and is handed on inside that node."""

from __future__ import annotations

import os
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .dispatch_base import ExpertDispatcher, Pairs, flat_pairs, meanwhile
from .dispatch_deduplicated import send_once


class HierarchicalDispatcher(ExpertDispatcher):
    """Experts inside the node first, while the tokens for other nodes travel.

    A token crosses once to each other node, to the rank with the sender's place in it, so a rank sends one message per node
    and not per rank. That rank deals the token to the node's ranks, sums their results and sends one row back.

    Host syncs: three per layer, for the split sizes (across, inside for the node's own tokens, inside for the others').

    Example: 8 experts on 2 nodes of 2 ranks, top-3. Token t of rank 0 picks E3, E4 and E6.

    node               [_________ 0 _________]   [_________ 1 _________]
    GPU                    0            1            2            3
                           |            |            |            |
    batch               [..t..]
    experts              E0 E1        E2 E3        E4 E5        E6 E7
    across nodes                                  t from 0                 starts first, waited for last
    inside node 0                    t from 0                              runs meanwhile
    inside node 1                                 t from 2    t from 2
    output[t]        inside node 0: w E3(t); from rank 2, in one row: w' E4(t) + w" E6(t)
    """

    ranks_per_node: int | None = None  # None: the launcher's LOCAL_WORLD_SIZE

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        per_node = self.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", self.num_ranks))
        per_node = min(per_node, self.num_ranks)
        if self.num_ranks % per_node:
            raise ValueError(
                f"`ranks_per_node`={per_node} does not divide `ep_size`={self.num_ranks}: make expert groups of whole nodes."
            )
        self.node_size, self.num_nodes = per_node, self.num_ranks // per_node
        self.across, self.inside = _node_groups(ep_mesh, self.num_nodes, per_node)

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        slots_of_node = self.node_size * self.experts_per_rank
        node_P = slots_TK.reshape(-1) // slots_of_node  # `num_nodes`: none
        own_node = self.rank // self.node_size
        pairs = flat_pairs(slots_TK % slots_of_node, weights_TK)
        elsewhere_P = torch.where(node_P == own_node, self.num_nodes, node_P)
        crossing = send_once(x_TD, pairs, elsewhere_P, slots_of_node, self.across)
        meanwhile()
        y_TD = self._inside(x_TD, pairs, node_P == own_node)
        x_ND, crossed = crossing.wait()
        return y_TD + crossing.give_back(self._inside(x_ND, crossed))

    def _inside(self, x_ND: Tensor, pairs: Pairs, wanted_P: Tensor | None = None) -> Tensor:
        """Rows to the ranks of this node that hold their experts, and the sums of the results.

        Args:
            x_ND: rows that lie on this rank.
            pairs: their pairs, with ids of the node's experts.
            wanted_P: which pairs count (default: all).
        """
        rank_P = pairs.id_P // self.experts_per_rank
        if wanted_P is not None:
            rank_P = torch.where(wanted_P, rank_P, self.node_size)
        local = Pairs(pairs.row_P, pairs.id_P % self.experts_per_rank, pairs.weight_P)
        sent = send_once(x_ND, local, rank_P, self.experts_per_rank, self.inside)
        rows_ND, received = sent.wait()
        return sent.give_back(self.run_pairs(rows_ND, received))


# of expert groups, by the ranks of a node
_NODE_GROUPS: WeakKeyDictionary[ProcessGroup, dict[int, tuple[ProcessGroup, ProcessGroup]]] = WeakKeyDictionary()


def _node_groups(ep_mesh: DeviceMesh, nodes: int, per_node: int) -> tuple[ProcessGroup, ProcessGroup]:
    """The ranks with this rank's place in all nodes, and those of this rank's node; made once for all layers."""
    known = _NODE_GROUPS.setdefault(ep_mesh.get_group(), {})
    if per_node not in known:
        mesh = ep_mesh._unflatten(0, (nodes, per_node), ("ep_node", "ep_inside"))
        known[per_node] = mesh.get_group("ep_node"), mesh.get_group("ep_inside")
    return known[per_node]
