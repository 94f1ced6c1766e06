"""Train a rank in a process that has imported only what the loop itself imports.

python -m tests.pipelines.training.loop.fresh FOLDER
"""

import sys
from pathlib import Path

from pipelines.shards.ingest.write import ingest
from pipelines.storage import Storage
from tests.pipelines.training.loop.ranks import SMALL, tiny_config, train_here

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    digits = ingest("digits", f"file://{folder}/digits", Storage(), image_size=8, channels=1).dataset
    config = tiny_config(folder / "run", 60, 30, *SMALL, "checkpoint.every=30", "tracking.grid_every=30")
    shell, _ = train_here(folder / "run", digits, config)
    print(shell.reports[-1].images_seen)
