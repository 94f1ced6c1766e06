"""The meaning of each metric of a run; scores, `eval/NAME`, are in `pipelines.evaluation.scores`."""

METRICS = {
    "train/loss": "Mean training loss of the steps since the last point. Losses of different schedules or objectives "
    "are not comparable.",
    "train/loss/SOURCE": "Mean training loss of the samples of one source of a mixture, by its name in data.sources.",
    "train/images_per_s": "Images trained per second, by all workers together.",
    "train/length": "Images after which the run ends, as corrected by the measured speed; only with training_s.",
    "train/goodput": "Goodput: share of the drivers' time spent on training steps that were kept, 0 to 1.",
    "updates/lr": "Learning rate.",
    "updates/grad_norm": "Mean gradient norm before clipping.",
    "updates/skipped": "Updates skipped so far because the loss or gradient was not finite.",
    "updates/loss_scale": "Loss scale in fp16, which keeps small gradients from vanishing.",
    "worker/data_wait_share": "Share of time in which rank 0 waited for data.",
    "worker/memory_gib": "Peak memory of rank 0 in GiB: of tensors on its GPU, or of its process without a GPU.",
    "worker/mfu": "Computing speed as a share of the GPU's dense bf16 peak.",
    "worker/fetched_mib": "MiB of shards that rank 0 has fetched from storage since it was started.",
    "worker/requests": "Requests for shards that rank 0 has made to storage since it was started.",
    "worker/requests_per_s": "Requests for objects that rank 0 has sent to S3 in the last second.",
    "worker/slow_downs": "Answers of S3 to rank 0 since its process was started that it reads too fast.",
    "worker/throttled_s": "Seconds since its process was started in which the reads of rank 0 were limited for that.",
    "worker/whole_shards": "Shards that rank 0 has put into the node's cache since it was started.",
    "worker/cache_hits": "Share of the samples of rank 0 that came from complete shards in the node's cache, 0 to 1.",
    "test/accuracy_tLEVEL": "Accuracy of a classifier of noisy images at that timestep, on test images.",
    "eval/frechet_floor": "Frechet distance of real test images, the floor of eval/frechet_distance.",
    "eval/frechet_low": "Lower end of the 95 % interval of eval/frechet_distance.",
    "eval/frechet_high": "Upper end of the 95 % interval of eval/frechet_distance.",
    "search/SCORE": "Scores of the trials of a study, by the names of the scores.",
    "steps/CHOICE": "Distance of samples by a choice of levels from the ends of fine trajectories of the model.",
}
"""Metric -> its meaning. Parts in capitals are placeholders for numbers or names."""
