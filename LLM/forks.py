"""What a forked child must make anew: locks, connections, threads, random seeds.

A lock that another thread held at the fork stays locked for ever in the child, and a socket that both
processes write to mixes their answers. Objects that own such things register here.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    def after_fork(self) -> None:
        """Replace, in the child and without closing anything of the parent's, what a fork breaks."""


# The one registry of the process: `os.register_at_fork` cannot be undone, so it is called once, and
# the objects are held weakly.
_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()


def renew_after_fork(thing: Forkable) -> None:
    """Call `thing.after_fork()` in every child forked while `thing` is alive."""
    _forkables.add(thing)


def _renew() -> None:
    for thing in list(_forkables):
        thing.after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork either
    os.register_at_fork(after_in_child=_renew)
