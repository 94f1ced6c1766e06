"""The start of a worker, which is mostly imports: this module imports nothing, so that it runs before them.

Python's garbage collector looks through all objects time and again while modules are imported, and finds hardly any to
free. Without it a worker starts a quarter sooner.
"""

from __future__ import annotations

import gc
import pickle


def run(call: dict[str, bytes]) -> None:
    """Load a function and its settings, which imports all that they need, and call it.

    Args:
        call: under "pickled", the pickle of (function, settings).
    """
    gc.disable()  # until `end_startup`
    function, settings = pickle.loads(call["pickled"])
    function(settings)


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
