"""The entry point of `python -m benchmarks.time_to_quality`."""

import os

# Before torch is imported: spinning threads slow a step down as soon as another process needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.time_to_quality.run import main

if __name__ == "__main__":
    main()
