"""Training on Ray Train: driver and rank loop."""

import time

STARTED = time.monotonic()
"""When this process began to be a part of a training: before torch and Ray are imported, which takes seconds."""
