"""The garbage collector of a worker, which rests while the worker starts (`ray_train.callbacks`), and comes back."""

from __future__ import annotations

import gc


def end_startup() -> None:
    """Turn the garbage collector on again where it was off, and exempt all present objects from it."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def collect_all() -> None:
    """Free all unreferenced objects, those that `end_startup` exempted included."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
