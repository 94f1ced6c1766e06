"""Training: the driver of a run, Ray Train around its workers, and the loop of each worker."""

import time

STARTED = time.monotonic()
"""When this process began to take part in a training: before torch and Ray are imported, which takes seconds."""
