"""The stages of the flow as Dagster assets: the only package that imports dagster.

`definitions` makes the assets, their job, sensor and schedule from the graph of `pipelines.flow`, `settings` says for
which experiments and when, `child` is the process in which a stage runs, `facts` describes results for Dagster and
detects new data, `on_kubernetes` runs a stage as a RayJob, and `launcher` checks whether the process of a run is alive.
Dagster records what ran when; whether a result exists is looked up in storage, by the digests of `pipelines.flow`, and
an asset whose result exists is skipped.
"""
