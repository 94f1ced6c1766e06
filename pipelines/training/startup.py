"""The garbage collector of a worker, which rests while the worker starts (`ray_train.quick_start`), and comes back."""

from __future__ import annotations

import gc


def end_startup() -> None:
    """Let the garbage collector run again, where it was stopped, but not look at what there is already."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def collect_all() -> None:
    """Free what nothing refers to any more, of what there was at the end of the startup, too."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
