"""The entry point of `python -m benchmarks.data`."""

import os

# Before torch is imported: with other processes running, a step on many threads is ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.data.run import main

if __name__ == "__main__":  # not in child processes
    main()
