"""The way from images to a registered model, as stages: values that are walked here, or by an orchestrator.

`stage` says what a stage is and where each has its place, `graph` makes the stages of a configuration, and `walk` runs
those of which no result is there. There is no record of finished stages beside their results: each stage looks for its
own (`ingest` the dataset, `train` the run, `judge` scores, version and alias) and compares digests.
"""

from pipelines.flow.stage import GRAPH, Results, Site, Stage, StageSpec, StageStatus, select

__all__ = ["GRAPH", "Results", "Site", "Stage", "StageSpec", "StageStatus", "select"]
