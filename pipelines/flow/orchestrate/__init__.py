"""The stages of the flow as Dagster assets: the only package that imports dagster.

`definitions` makes the assets, their job, sensor and schedule from the graph of `pipelines.flow`, `settings` says for
which experiments and when, `child` is the process in which a stage runs, `facts` is what it tells Dagster of a result,
`news` whether there are data that no run has seen, `on_kubernetes` runs a stage as a RayJob, and `launcher` says
whether the process of a run lives. Dagster remembers what ran when; whether a result is there is looked up where
results are, by the digests of `pipelines.flow`, and an asset whose result is there is skipped.
"""
