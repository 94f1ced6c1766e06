"""The `ddpm` command as a module, for a process that starts it as a fork: see `workers.py`."""

from pipelines.cli import main

main()
