# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What a MoE layer tells the dispatcher of its expert-parallel experts, beside the tokens.

The experts' forward has Transformers' signature, which has no place for it. So a `DispatchScope` is active while
expert-parallel experts run, and a dispatcher finds it with `current_dispatch()`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class DispatchScope:
    """One call of a layer's expert-parallel experts.

    Attributes:
        meanwhile: work that needs no exchange (the shared experts). A dispatcher calls it once, after it has started to send
            tokens and before it waits for them; the layer does it afterwards if none did.
        rows_per_expert: the most tokens of this rank's batch that one expert gets (its capacity); `None`: unknown.
    """

    meanwhile: Callable[[], None] | None = None
    rows_per_expert: int | None = None


class _Active(threading.local):
    """Of each thread: autograd recomputes checkpointed layers in threads of its own."""

    scopes: tuple[DispatchScope, ...] = ()


_ACTIVE = _Active()


def current_dispatch() -> DispatchScope | None:
    """The scope of the experts that run, or `None`: then there is nothing to do meanwhile and no capacity is known."""
    return _ACTIVE.scopes[-1] if _ACTIVE.scopes else None


@contextmanager
def dispatching(scope: DispatchScope) -> Iterator[DispatchScope]:
    """Make a scope the active one."""
    before = _ACTIVE.scopes
    _ACTIVE.scopes = (*before, scope)
    try:
        yield scope
    finally:
        _ACTIVE.scopes = before
