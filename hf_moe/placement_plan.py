# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""On which expert-parallel rank each expert should lie, from how many tokens each gets. Plain numbers, no tensors.

Letters: E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class PlacementPlan(NamedTuple):
    """Where experts should lie.

    Attributes:
        new_slots: `[E]`, the slot of each expert.
        before, after: load of the fullest rank over the mean of the ranks, now and then.
        moved: how many experts change their rank; the others keep their slot.
    """

    new_slots: list[int]
    before: float
    after: float
    moved: int


def plan_placement(
    load_E: Iterable[float],
    experts_per_rank: int,
    num_ranks: int,
    current: Sequence[int] | None = None,
    *,
    tolerance: float = 0.01,
) -> PlacementPlan:
    """Spread the load over ranks with a fixed number of slots each.

    Two ways are tried. The first is longest processing time first: the experts, heaviest first, go to the least loaded rank
    that has a free slot. The second starts from where experts lie. Both then exchange the fullest rank's experts for lighter
    ones as long as that helps. Of what comes within the tolerance of the better one, that is taken which moves the fewest
    experts, after every move is taken back that is not needed.

    Args:
        load_E: what each expert has to do (tokens), in any unit.
        experts_per_rank: slots of a rank; the last ranks have fewer, or none, if E is no multiple of it.
        num_ranks: R.
        current: the slot of each expert (default: its own number).
        tolerance: the share by which the fullest rank may be fuller than it need be, to move fewer experts.

    Returns:
        A plan that is no worse than `current`.

    Raises:
        ValueError: the experts do not fit, or `current` is no permutation.

    Example:
        >>> plan_placement([8, 7, 1, 2], experts_per_rank=2, num_ranks=2)
        PlacementPlan(new_slots=[3, 1, 2, 0], before=1.6666666666666667, after=1.0, moved=2)
    """
    loads = [float(load) for load in load_E]
    slots = list(range(len(loads))) if current is None else [int(slot) for slot in current]
    if len(loads) > experts_per_rank * num_ranks:
        raise ValueError(
            f"`load_E` has {len(loads)} experts, more than `num_ranks`={num_ranks} × "
            f"`experts_per_rank`={experts_per_rank} slots."
        )
    if sorted(slots) != list(range(len(loads))):
        raise ValueError(f"`current`={slots} must name each of the slots 0 to {len(loads) - 1} once.")
    home = [slot // experts_per_rank for slot in slots]
    room = [max(0, min(experts_per_rank, len(loads) - rank * experts_per_rank)) for rank in range(num_ranks)]
    packing = _Packing(loads, home, room)
    first = packing.improve(packing.longest_first())
    enough = (1 + tolerance) * min(packing.fullest(first), packing.fullest(packing.improve(home))) + packing.least
    tries = [packing.bring_home(rank_E, enough) for rank_E in (packing.improve(home, enough), first)]
    best = min((rank_E for rank_E in tries if packing.fullest(rank_E) <= enough), key=packing.moved)
    before, after = (max_over_mean(packing.rank_loads(rank_E)) for rank_E in (home, best))
    new_slots = _slots(slots, home, best, experts_per_rank, room)
    return PlacementPlan(new_slots, before, after, packing.moved(best))


def max_over_mean(load_R: Sequence[float]) -> float:
    """The fullest rank's load over the mean; 1 where there is no load."""
    total = sum(load_R)
    return max(load_R) * len(load_R) / total if total else 1.0


class _Packing:
    """Experts with loads, and ranks with room for a number of them."""

    def __init__(self, loads: list[float], home: list[int], room: list[int]) -> None:
        self.loads, self.home, self.room = loads, home, room
        self.least = 1e-9 * sum(loads)  # what is worth an exchange, above the rounding of sums

    def rank_loads(self, rank_E: list[int]) -> list[float]:
        """`[R]`, of an assignment of experts to ranks."""
        found = [0.0] * len(self.room)
        for load, rank in zip(self.loads, rank_E, strict=True):
            found[rank] += load
        return found

    def fullest(self, rank_E: list[int]) -> float:
        """The highest load of a rank."""
        return max(self.rank_loads(rank_E), default=0.0)

    def moved(self, rank_E: list[int]) -> int:
        """How many experts are not at home."""
        return sum(one != other for one, other in zip(self.home, rank_E, strict=True))

    def longest_first(self) -> list[int]:
        """Longest processing time first, each rank then named after that of its kind where most of its experts are at home."""
        free, load_R, group_E = list(self.room), [0.0] * len(self.room), [0] * len(self.loads)
        for expert in sorted(range(len(self.loads)), key=lambda e: -self.loads[e]):
            open_ranks = [rank for rank, places in enumerate(free) if places]
            rank = min(open_ranks, key=lambda r: (load_R[r], r != self.home[expert]))
            group_E[expert] = rank
            load_R[rank] += self.loads[expert]
            free[rank] -= 1
        names = self._names(group_E)
        return [names[group] for group in group_E]

    def _names(self, group_E: list[int]) -> dict[int, int]:
        """A rank for each group of experts, so that many stay where they are."""
        shared: dict[tuple[int, int], int] = {}
        for pair in zip(group_E, self.home, strict=True):
            shared[pair] = shared.get(pair, 0) + 1
        names: dict[int, int] = {}
        for group, rank in sorted(shared, key=lambda pair: -shared[pair]):
            if group not in names and rank not in names.values() and self.room[group] == self.room[rank]:
                names[group] = rank
        for group, places in enumerate(self.room):  # those that share no expert with a rank that is left
            if group not in names:
                names[group] = next(r for r, room in enumerate(self.room) if room == places and r not in names.values())
        return names

    def improve(self, rank_E: list[int], enough: float = 0.0) -> list[int]:
        """Exchange an expert of the fullest rank for a lighter one elsewhere, the best one each time.

        Args:
            rank_E: where to start.
            enough: a load of the fullest rank that needs no improvement.
        """
        rank_E, load_R = list(rank_E), self.rank_loads(rank_E)
        experts = range(len(self.loads))
        while True:
            full = max(range(len(load_R)), key=load_R.__getitem__)
            if load_R[full] <= enough:
                return rank_E
            here = [expert for expert in experts if rank_E[expert] == full]
            choices = (
                (max(load_R[full] - gain, load_R[rank_E[other]] + gain), one, other)
                for other in experts
                if rank_E[other] != full
                for one in here
                if (gain := self.loads[one] - self.loads[other]) > self.least
            )
            peak, one, other = min(choices, default=(load_R[full], 0, 0))
            if load_R[full] - peak <= self.least:
                return rank_E
            gain = self.loads[one] - self.loads[other]
            load_R[full] -= gain
            load_R[rank_E[other]] += gain
            rank_E[one], rank_E[other] = rank_E[other], rank_E[one]

    def bring_home(self, rank_E: list[int], limit: float) -> list[int]:
        """Take back what is not needed: an expert goes home, in exchange for one there that is not at home either.

        Args:
            rank_E: an assignment.
            limit: the load that no rank may exceed.
        """
        rank_E, load_R = list(rank_E), self.rank_loads(rank_E)
        for expert, home in enumerate(self.home):
            guests = [g for g, rank in enumerate(rank_E) if rank == home != self.home[g] and rank_E[expert] != home]
            for guest in sorted(guests, key=lambda g: self.home[g] != rank_E[expert]):
                away, gain = rank_E[expert], self.loads[expert] - self.loads[guest]
                if load_R[home] + gain <= limit and load_R[away] - gain <= limit:
                    load_R[home] += gain
                    load_R[away] -= gain
                    rank_E[expert], rank_E[guest] = home, away
                    break
        return rank_E


def _slots(current: list[int], home: list[int], rank_E: list[int], experts_per_rank: int, room: list[int]) -> list[int]:
    """Slots for the experts of each rank: those that stay keep theirs."""
    kept = {slot for slot, one, other in zip(current, home, rank_E, strict=True) if one == other}
    free = [[s for s in range(r * experts_per_rank, r * experts_per_rank + n) if s not in kept] for r, n in enumerate(room)]
    return [slot if one == other else free[other].pop(0) for slot, one, other in zip(current, home, rank_E, strict=True)]
