# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Is specialisation there? The verdict, in plain sentences, from tests and not from the look of a picture.

Three questions, in this order. Do the experts of a layer differ at all? Does the choice of experts depend on the text more than
on shuffled text (`dependence`)? Does it depend on it more than that of routers that nobody trained (`random_routers`)? Only if
all three are answered with yes is there specialisation that training made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .dependence import Dependence
from .expert_similarity import ExpertSimilarity
from .random_routers import RandomComparison
from .routing_analysis import ENOUGH, Load

ALPHA = 0.01  # for each of two labels, over all layers and for any single layer: together under 5 %
MIN_SHARE = 0.01  # of the choice; less is not worth a word, significant or not
MIN_EXCESS = 0.03  # of the choice, beyond random routers
MIN_Z = 4.0  # of the excess; the shares of random routers have a longer tail than a normal distribution
MIN_EXCESS_OF_LAYER, MIN_Z_OF_LAYER = 0.1, 6.0  # the same in a single layer, where one random router in many hits a domain
JUDGED = {"token": "the token", "part": "the part of the text"}

Level = Literal["present", "weak", "none", "fixed", "unknown"]
SAME = "The routers give nearly every token the same experts: there is no choice that the text could explain."
CLEAR_EXCESS = 0.1
BEGUN = "The experts have begun to specialise."
HEADLINES: dict[Level, str] = {
    "present": "The experts are specialised.",
    "weak": "No specialisation beyond what random routers show.",
    "none": "There is no specialisation.",
    "fixed": "Experts have tokens of their own by a fixed rule.",
    "unknown": "Specialisation could not be tested.",
}


@dataclass(frozen=True)
class Verdict:
    """What the page says first.

    Attributes:
        level: `present`; `weak` (the choice depends on the text, but that of random routers does so as much); `none`; `fixed`
            (the router has no weights: its rule is no work of training); `unknown` (nothing could be tested).
        headline: one sentence.
        sentences: the reasons, with numbers.
    """

    level: Level
    headline: str
    sentences: list[str] = field(default_factory=list)


def judge(
    dependences: Mapping[str, Dependence],
    comparisons: Mapping[str, RandomComparison],
    similarities: Sequence[ExpertSimilarity],
    learned: bool = True,
) -> Verdict:
    """The verdict on specialisation.

    Args:
        dependences: by label; `token` and `part` decide, others are not looked at.
        comparisons: by label; one that is missing was not made.
        similarities: of the experts of every MoE layer whose weights were found.
        learned: whether the routers have weights.
    """
    tested = {name: dependences[name] for name in JUDGED if name in dependences and dependences[name].share is not None}
    depends = {name: found for name, found in tested.items() if _depends(found)}
    beyond = [name for name in depends if name in comparisons and _beyond(tested[name], comparisons[name])]
    copies = [similarity.layer for similarity in similarities if similarity.identical]
    same = bool(dependences) and all(layer.share is None for found in dependences.values() for layer in found.layers)
    level: Level
    if same or (copies and len(copies) == len(similarities)):
        level = "none"
    elif not tested:
        level = "unknown"
    elif not depends:
        level = "none"
    elif not learned:
        level = "fixed"
    elif not any(name in comparisons for name in depends):
        level = "unknown"
    else:
        level = "present" if beyond else "weak"
    sentences = _about_copies(copies, similarities) + [SAME] * same
    for name, found in tested.items():
        sentences.append(_about(JUDGED[name], found, comparisons.get(name), name in beyond, learned))
    excess = max(((tested[name].share or 0.0) - comparisons[name].share for name in beyond), default=0.0)
    headline = BEGUN if level == "present" and excess < CLEAR_EXCESS else HEADLINES[level]
    return Verdict(level, headline, sentences)


def _depends(found: Dependence) -> bool:
    """More than on shuffled text, in the mean of the layers or clearly in one of them."""
    over_all = found.p is not None and found.p <= ALPHA and (found.share or 0.0) >= MIN_SHARE
    return over_all or any((layer.p or 1.0) <= ALPHA and (layer.share or 0.0) >= 2 * MIN_SHARE for layer in found.layers)


def _beyond(found: Dependence, random: RandomComparison) -> bool:
    """More than random routers do, in the mean of the layers or clearly in one of them."""
    excess = (found.share or 0.0) - random.share
    return (random.p <= ALPHA and random.z >= MIN_Z and excess >= MIN_EXCESS) or bool(layers_beyond(found, random))


def layers_beyond(found: Dependence, random: RandomComparison) -> list[int]:
    """Decoder layers in which by itself the choice depends on the label more than that of any random router."""
    return [
        own.layer
        for own, other in zip(found.layers, random.layers, strict=True)
        if own.share is not None
        and other is not None
        and (other.p <= ALPHA and other.z >= MIN_Z_OF_LAYER and own.share - other.share >= MIN_EXCESS_OF_LAYER)
    ]


def _about_copies(copies: list[int], similarities: Sequence[ExpertSimilarity]) -> list[str]:
    if not similarities:
        return []
    if len(copies) == len(similarities):
        which = "this layer" if len(copies) == 1 else f"each of the {len(copies)} MoE layers"
        return [
            f"The experts of {which} are still identical, so it makes no difference which of them computes a token, "
            "whatever the router does."
        ]
    found = [s.mean_of_pairs("distance_EE") for s in similarities if not s.identical]
    distances = [distance for distance in found if distance is not None]
    sentences = []
    if distances:
        ends = dict.fromkeys([percent(min(distances)), percent(max(distances))])
        sentences.append(
            f"Two experts of a layer differ by {' to '.join(ends)} of the norm of their weights (0 % are copies, 141 % are "
            "unrelated)."
        )
    if copies:
        sentences.append(f"{_the_experts(copies)} still identical.")
    return sentences


def _the_experts(layers: list[int]) -> str:
    listed = ", ".join(map(str, layers[:8])) + (f" and {len(layers) - 8} more" if len(layers) > 8 else "")
    return f"The experts of {'layer' if len(layers) == 1 else 'layers'} {listed} are"


def _about(what: str, found: Dependence, random: RandomComparison | None, beyond: bool, learned: bool) -> str:
    share, p = found.share or 0.0, found.p or 1.0
    if not _depends(found):
        return f"The choice of experts does not depend on {what}: it explains {percent(share)} of it (p = {p:.2g})."
    start = f"{what[0].upper()}{what[1:]} explains {percent(share)} of the choice of experts (shuffled text: 0 %, p = {p:.2g})"
    if not learned:
        return f"{start}. The routers have no weights: that is their rule, not the work of training."
    if random is None:
        return f"{start}. It was not compared with random routers."
    other = f"random routers on the same hidden states reach {percent(random.share)} ± {percent(random.std)}"
    if not beyond:
        return f"{start}; {other}: this is {_compared(share, random)}."
    layers = layers_beyond(found, random)
    where = f" (in {len(layers)} of {len(found.layers)} layers by itself)" if layers and len(found.layers) > 1 else ""
    return f"{start}; {other}: this is more{where}."


def _compared(share: float, random: RandomComparison) -> str:
    if random.z > 1:
        return "not clearly more"
    return "less" if random.z < -MIN_Z else "no more"


def percent(share: float) -> str:
    """A share in per cent, with a digit after the point where it is small."""
    value = 100 * share
    return f"{value:.2g} %" if abs(value) < 10 else f"{value:.0f} %"


# ---------------------------------------------------------------------- load


@dataclass(frozen=True)
class LoadVerdict:
    """How evenly the experts are used: `balanced`, `uneven`, `dead` experts, `collapsed`, or too little to say; and why."""

    level: Literal["balanced", "uneven", "dead", "collapsed", "unknown"]
    sentences: list[str]


def judge_load(layers: Sequence[int], loads: Sequence[Load], text: str) -> LoadVerdict:
    """The verdict on the load.

    Args:
        layers: decoder layer of each of `loads`.
        loads: of every MoE layer.
        text: of what, e.g. "On this text".
    """
    least = min(sum(load.counts) / len(load.counts) for load in loads)
    if least < ENOUGH:
        return LoadVerdict("unknown", [f"{text}, a fair share is {least:.3g} assignments: too few to say more."])
    worst = max(range(len(loads)), key=lambda row: loads[row].max_over_mean)
    collapsed = [layer for layer, load in zip(layers, loads, strict=True) if load.collapsed]
    dead = {layer: load.dead for layer, load in zip(layers, loads, strict=True) if load.dead}
    number = f"{loads[worst].max_over_mean:.2f} times its fair share"
    peak = f"{text}, the busiest expert has {number}" + (f" (in layer {layers[worst]})." if len(loads) > 1 else ".")
    sentences = []
    if collapsed:
        listed = f"layer{'s' * (len(collapsed) > 1)} {', '.join(map(str, collapsed))}"
        sentences.append(f"{text}, the routing has collapsed in {listed}: a few experts do nearly everything.")
    if dead:
        many = sum(map(len, dead.values()))
        sentences.append(f"{text}, {f'{many} experts get' if many > 1 else 'an expert gets'} nothing: {_dead(dead)}.")
    if collapsed or dead:
        return LoadVerdict("collapsed" if collapsed else "dead", [*sentences, peak])
    return LoadVerdict("uneven" if loads[worst].max_over_mean > 1.5 else "balanced", [peak])


def _dead(dead: Mapping[int, list[int]], most: int = 6) -> str:
    listed = [f"{', '.join(map(str, experts[:most]))} in layer {layer}" for layer, experts in list(dead.items())[:most]]
    return "; ".join(listed) + (" and others" if len(dead) > most or any(len(e) > most for e in dead.values()) else "")
