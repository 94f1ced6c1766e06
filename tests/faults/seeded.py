"""Faults that the tests have to catch: slips that are easily made, one for each of the promises of this project.

`run.py` writes them one at a time into a copy of the checkout and runs the tests that are named here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A fault that breaks a promise, and the tests that catch it.

    Attributes:
        name: of the fault.
        promise: that it breaks, as a sentence.
        path: of the source file, relative to the root of the project.
        before: text that occurs once in the file.
        after: the faulty text in its place.
        tests: pytest node ids, one or two; run alone, one of them fails with the fault, and none without it.
    """

    name: str
    promise: str
    path: str
    before: str
    after: str
    tests: tuple[str, ...]

    def apply(self, source: str) -> str:
        """Return the text of the source file with the fault in it."""
        assert source.count(self.before) == 1, f"{self.name}: {self.before!r} occurs {source.count(self.before)} times"
        return source.replace(self.before, self.after)


MATHEMATICS = (
    Fault(
        "posterior_mean",
        "The mean of q(x_s | x_t, x_0) is that of DDPM, eq. 7.",
        "ddpm/gaussian.py",
        "per_sample(bar_s.sqrt() * (1 - step) / (1 - bar_t), x_t)",
        "per_sample(bar_t.sqrt() * (1 - step) / (1 - bar_t), x_t)",
        ("tests/ddpm/test_gaussian.py::test_the_posterior_is_bayes_rule",),
    ),
    Fault(
        "decoder",
        "The bound on 8-bit images has a discretized decoder as its last term (DDPM, eq. 13).",
        "ddpm/bound.py",
        "nats = -(p.log_prob(x_0) if levels is None else p.discretized_log_prob(x_0, levels))",
        "nats = -p.log_prob(x_0)",
        ("tests/ddpm/test_likelihood.py::test_one_known_image_costs_only_the_decoder",),
    ),
    Fault(
        "min_snr_of_v",
        "The weight of min-SNR is that of the same error of x_0, whatever the network predicts.",
        "ddpm/weights.py",
        '"v": clipped / (snr + 1),',
        '"v": clipped / snr,',
        ("tests/ddpm/test_objectives.py::test_min_snr_weighs_the_same_error_the_same_in_every_parameterization",),
    ),
    Fault(
        "second_order_term",
        "DPM-Solver++ is of second order.",
        "ddpm/samplers/dpm_solver.py",
        "half = h / (2 * h_previous)",
        "half = h / h_previous",
        (
            "tests/ddpm/test_ode_samplers.py::test_the_error_against_the_exact_ode_falls_with_the_order",
            "tests/ddpm/test_ode_samplers.py::test_dpm_solver_agrees_with_diffusers_from_the_same_noise",
        ),
    ),
    Fault(
        "eps_of_clipped_x0",
        "Where the predicted x_0 is clipped, eps is computed again, so that both still add up to x_t.",
        "ddpm/prediction.py",
        "    x_0 = prediction.x0.clamp(-bound, bound)\n"
        "    return replace(prediction, x0=x_0, eps=eps_from_x0(x_0, x_t, t, schedule))",
        "    x_0 = prediction.x0.clamp(-bound, bound)\n    return replace(prediction, x0=x_0)",
        ("tests/ddpm/test_prediction.py::test_clipping_keeps_image_and_noise_on_the_line_through_x_t",),
    ),
    Fault(
        "classifier_free_scale",
        "Classifier-free guidance is null + scale (cond - null), and not (1 + scale) times the difference.",
        "ddpm/guidance.py",
        "x0=torch.lerp(base.x0, pred.x0, self.scale), eps=torch.lerp(base.eps, pred.eps, self.scale)",
        "x0=torch.lerp(base.x0, pred.x0, 1 + self.scale), eps=torch.lerp(base.eps, pred.eps, 1 + self.scale)",
        ("tests/ddpm/test_guidance.py::test_other_scales_extrapolate_from_null_to_conditional_in_one_batch",),
    ),
    Fault(
        "classifier_sign",
        "A classifier guides towards its class.",
        "ddpm/guidance.py",
        "x0=pred.x0 + over_alpha * push, eps=pred.eps - push)",
        "x0=pred.x0 - over_alpha * push, eps=pred.eps + push)",
        (
            "tests/ddpm/test_guidance.py"
            "::test_an_exact_classifier_turns_the_unconditional_model_into_the_conditional_one",
        ),
    ),
    Fault(
        "divergence_sign",
        "The likelihood by the probability-flow ODE has the integral of the divergence added to the prior.",
        "ddpm/likelihood.py",
        "return OdeDensity((prior or _standard_normal)(x_T) + change,",
        "return OdeDensity((prior or _standard_normal)(x_T) - change,",
        ("tests/ddpm/test_likelihood.py::test_gaussian_density_is_exact_from_the_exact_prior[exact]",),
    ),
    Fault(
        "known_pixels",
        "In inpainting by replacement, known pixels have the forward process at every level.",
        "ddpm/samplers/repaint.py",
        "torch.where(mask, alpha * known, p.mean)",
        "torch.where(mask, known, p.mean)",
        ("tests/ddpm/test_inpainting.py::test_known_pixels_have_the_forward_process_at_every_level_jumps_included",),
    ),
)

DATA = (
    Fault(
        "exactly_once",
        "Every epoch has every sample exactly once.",
        "pipelines/shards/order.py",
        "last = np.minimum(first + self.window, plan.lane_of[lane + 1])",
        "last = np.minimum(first + self.window, len(plan.lane_shards))",
        ("tests/pipelines/shards/test_order.py::test_every_epoch_holds_every_sample_exactly_once",),
    ),
    Fault(
        "split_among_ranks",
        "The ranks share a global batch without gap or overlap, whatever their number.",
        "pipelines/shards/order.py",
        "return slice(rank * size // world_size, (rank + 1) * size // world_size)",
        "return slice(rank * (size // world_size), (rank + 1) * (size // world_size))",
        (
            "tests/pipelines/shards/test_order.py"
            "::test_ranks_share_a_batch_without_gap_or_overlap_whatever_their_number",
        ),
    ),
    Fault(
        "resumed_range",
        "A ranged read whose connection breaks goes on from the byte that it has reached.",
        "pipelines/storage/store.py",
        "for part in self.stream(uri, at, stop):",
        "for part in self.stream(uri, start, stop):",
        (
            "tests/pipelines/shards/test_fetch.py"
            "::test_a_broken_connection_is_resumed_from_the_byte_that_it_reached[False]",
        ),
    ),
    Fault(
        "rate_after_slow_down",
        "A process reads at half the rate, again and again, from a store that answers SlowDown.",
        "pipelines/storage/rate.py",
        "            self.rate = max(self.rate / 2, LEAST)\n",
        "            self.rate = max(self.before / 2, LEAST)\n",
        ("tests/pipelines/storage/test_rate.py::test_a_storm_halves_the_rate_once_a_second_down_to_the_least",),
    ),
    Fault(
        "lanes_of_a_node",
        "Whether a node caches whole shards is decided by the lanes that its own ranks read.",
        "pipelines/shards/working_set.py",
        '    last = int(np.searchsorted(least, span.stop - 1, side="right"))',
        '    last = int(np.searchsorted(most, span.stop - 1, side="right"))',
        (
            "tests/pipelines/shards/test_working_set.py"
            "::test_the_lanes_of_a_node_reach_from_the_first_to_the_last_that_its_ranks_read_in_some_batch",
        ),
    ),
    Fault(
        "record_of_a_changed_tar",
        "An index and a check that continue read each tar again that has changed since.",
        "pipelines/shards/audit/recorded.py",
        "return None if entry is None else [entry.size, entry.tag or entry.modified or uuid4().hex]",
        "return None if entry is None else [entry.size]",
        ("tests/pipelines/shards/audit/test_recorded.py::test_a_tar_that_has_changed_since_is_read_again",),
    ),
    Fault(
        "checksum_in_the_cache",
        "A copy of a shard that has been damaged on the node's disk is not trained on.",
        "pipelines/shards/cache.py",
        "if any(zlib.crc32(data) != m.crc32 for m, data in zip(members, found, strict=True)):",
        "if any(len(data) != m.size for m, data in zip(members, found, strict=True)):",
        ("tests/pipelines/shards/test_fetch.py::test_a_copy_that_lost_its_bytes_is_fetched_again",),
    ),
    Fault(
        "checksum_of_the_index",
        "A node's copy of a sidecar that has been damaged on its disk is made again.",
        "pipelines/shards/node_index.py",
        'if file.read(32) != hashlib.file_digest(file, "sha256").digest():',
        "if len(file.read(32)) != 32:",
        ("tests/pipelines/shards/test_node_index.py::test_a_damaged_copy_is_made_again[a bit]",),
    ),
    Fault(
        "first_sample_in_quarantine",
        "A quarantine leaves out the samples that it names and no others.",
        "pipelines/shards/quarantine.py",
        "            if problem.index is None:\n                found[problem.shard] = None",
        "            if not problem.index:\n                found[problem.shard] = None",
        ("tests/pipelines/shards/test_quarantine.py::test_exactly_what_the_quarantine_names_is_left_out",),
    ),
    Fault(
        "quarantine_in_the_digest",
        "The digest of a stream depends on what is in quarantine.",
        "pipelines/shards/quarantine.py",
        'f"{dataset.digest}/{quarantine.digest}"',
        'f"{dataset.digest}/{quarantine.dataset_digest}"',
        ("tests/pipelines/shards/test_quarantine.py::test_a_quarantine_changes_the_stream_and_its_reasons_do_not",),
    ),
)

TRAINING = (
    Fault(
        "fence",
        "A driver that was replaced can enter no checkpoint.",
        "pipelines/checkpoints/catalog.py",
        "        if before.epoch > listed.epoch:\n            raise fenced(join(folder, layout.CHECKPOINT_LIST))\n",
        "",
        ("tests/pipelines/checkpoints/test_catalog.py::test_a_replaced_driver_can_neither_enter_nor_delete",),
    ),
    Fault(
        "newest_checkpoint",
        "A run resumes from the newest driver's checkpoint, even where an earlier driver had seen more images.",
        "pipelines/checkpoints/catalog.py",
        "sorted(complete, key=lambda pair: pair[0], reverse=True)",
        "sorted(complete, key=lambda pair: pair[0].images_seen, reverse=True)",
        (
            "tests/pipelines/checkpoints/test_catalog.py"
            "::test_drivers_are_numbered_and_the_later_ones_checkpoints_are_newer",
        ),
    ),
    Fault(
        "sweep",
        "A sweep deletes incomplete checkpoints and those older than the oldest in the list, and no others.",
        "pipelines/checkpoints/catalog.py",
        "if name in kept or (name in complete and complete[name] >= current.checkpoints[0]):",
        "if name in kept:",
        ("tests/pipelines/checkpoints/test_catalog.py::test_a_sweep_deletes_only_remains_that_nobody_writes_any_more",),
    ),
    Fault(
        "restart_in_vain",
        "After a failure the workers start again only where the run has got further than before.",
        "pipelines/training/states.py",
        "(state.images_seen is None or seen > state.images_seen)",
        "(state.images_seen is None or seen >= state.images_seen)",
        (
            "tests/pipelines/training/test_states.py"
            "::test_after_a_failure_the_workers_start_again_only_from_a_newer_checkpoint",
        ),
    ),
    Fault(
        "resumed_stream",
        "A resumed run goes on with the sample after the last one of its checkpoint.",
        "pipelines/training/loop/train.py",
        "self.stream = training_stream(context, self.resumed_at)",
        "self.stream = training_stream(context, 0)",
        (
            "tests/pipelines/training/loop/test_train.py"
            "::test_a_stopped_run_resumes_to_the_same_weights_bit_for_bit[simple]",
        ),
    ),
    Fault(
        "identity",
        "The identity of a run has every setting that decides its losses, so that no run resumes with another.",
        "pipelines/config/schema.py",
        'decisive = {"task", "init_from", "seed", "batch_size",',
        'decisive = {"task", "init_from", "batch_size",',
        ("tests/pipelines/config/test_config.py::test_the_identity_covers_what_decides_the_trace_and_nothing_else",),
    ),
    Fault(
        "mean_of_means",
        "Gradients are weighted by samples, so that a batch in unequal parts gives the same as a whole one.",
        "pipelines/training/loop/train.py",
        "loss = mean = weight * (weights.to(each) * each).sum() / config.batch_size",
        "loss = mean = weight * (weights.to(each) * each).mean() / (\n"
        "                    math.ceil(config.batch_size / (config.micro_batch_size or config.batch_size))\n"
        "                )",
        (
            "tests/pipelines/training/loop/test_train.py"
            "::test_every_objective_trains_with_a_trace_that_is_the_same_in_parts[min_snr]",
        ),
    ),
    Fault(
        "half_life",
        "The half-life of the averaged weights grows with the run, so that early weights are forgotten.",
        "ddpm/ema.py",
        "half_life = min(self.half_life, max(self.ramp * images_seen, 1e-8))",
        "half_life = max(self.half_life, self.ramp * images_seen, 1e-8)",
        ("tests/ddpm/test_ema.py::test_early_weights_are_forgotten_fast",),
    ),
)

AROUND = (
    Fault(
        "level_of_an_attempt",
        "Attempts at an alias are tested at levels whose sum is bounded, however many there are.",
        "pipelines/evaluation/paired.py",
        "return LEVEL / attempt**2",
        "return LEVEL / attempt",
        ("tests/pipelines/registry/test_decision.py::test_every_attempt_is_tested_at_a_smaller_level",),
    ),
    Fault(
        "paired_difference",
        "The gate compares two versions by pairs of samples, in which what both have in common cancels.",
        "ddpm/quality/intervals.py",
        "self.influence - other.influence, self.over",
        "self.influence + other.influence, self.over",
        ("tests/pipelines/registry/test_decision.py::test_what_both_have_in_common_does_not_count",),
    ),
    Fault(
        "unsigned_evidence",
        "Evidence counts only where somebody who is trusted has signed it.",
        "pipelines/registry/contents.py",
        "return evidence if signature.passed else None, rows",
        "return evidence, rows",
        (
            "tests/pipelines/registry/test_contents.py"
            "::test_one_bit_of_the_weights_is_found_and_the_evidence_not_believed",
        ),
    ),
    Fault(
        "bearer_of_the_token",
        "A server answers only whoever bears its token.",
        "pipelines/serving/token.py",
        'digest) and kind.lower() == "bearer"',
        'digest) or kind.lower() == "bearer"',
        ("tests/pipelines/serving/test_token.py::test_only_the_bearer_of_the_token_is_allowed",),
    ),
    Fault(
        "secret_in_an_address",
        "No address that others may see keeps its password.",
        "pipelines/environment/credentials.py",
        'return bare if has_scheme else bare.removeprefix("//"), {',
        'return address if has_scheme else bare.removeprefix("//"), {',
        ("tests/pipelines/environment/test_credentials.py::test_user_info_becomes_variables",),
    ),
    Fault(
        "point_sent_twice",
        "A resumed run sends no point of a curve a second time.",
        "pipelines/tracking/run_log.py",
        "if step > self.last_steps.get(k, -1)}",
        "if step >= self.last_steps.get(k, -1)}",
        (
            "tests/pipelines/tracking/test_run_log.py"
            "::test_the_next_process_sends_what_a_killed_one_could_not_and_drops_what_it_computes_again",
        ),
    ),
    Fault(
        "point_lost",
        "Points wait while the server is away, and none is lost.",
        "pipelines/tracking/run_log.py",
        "            self._wait(path, error)\n            return False",
        "            self._wait(path, error)",
        (
            "tests/pipelines/tracking/test_run_log.py"
            "::test_points_wait_for_a_server_that_is_away_and_arrive_in_order_once",
        ),
    ),
    Fault(
        "holm",
        "A study compares the smallest p-value with the level divided by the number of settings (Holm 1979).",
        "pipelines/evaluation/paired.py",
        "<= at / (len(p_values) - place):",
        "<= at / (place + 1):",
        ("tests/pipelines/evaluation/test_paired.py::test_holm_takes_the_next_step_at_a_larger_level",),
    ),
)

NEWLY_TESTED = (
    Fault(
        "decoder_of_the_loss",
        "The loss of the bound has the decoder at t = 1, where the posterior has no density.",
        "ddpm/bound.py",
        "last = (t == 1).reshape",
        "last = (t == 0).reshape",
        (
            "tests/ddpm/test_objectives.py"
            "::test_at_the_first_step_the_term_is_the_decoder_and_the_posterior_has_no_density_there",
        ),
    ),
    Fault(
        "index_of_the_table",
        "A network is given the index of the table, which is one below the timestep.",
        "ddpm/prediction.py",
        "return x_t, (t - 1).clamp(min=0).float()",
        "return x_t, t.float()",
        (
            "tests/pipelines/training/loop/test_losses.py::test_the_network_is_told_the_index_of_the_table_one_below_the_timestep",
        ),
    ),
    Fault(
        "upside_down",
        "Images are mirrored left to right.",
        "pipelines/training/loop/losses.py",
        "x_0.flip(-1), x_0)",
        "x_0.flip(-2), x_0)",
        (
            "tests/pipelines/training/loop/test_losses.py"
            "::test_half_of_the_images_are_mirrored_left_to_right_and_the_others_are_as_they_were",
        ),
    ),
    Fault(
        "label_drop",
        "Labels are dropped sample by sample, as often as asked.",
        "pipelines/training/loop/losses.py",
        "Purpose.LABEL_DROP)[:, 0] < config.objective.label_drop",
        "Purpose.LABEL_DROP)[:, 0] > config.objective.label_drop",
        (
            "tests/pipelines/training/loop/test_losses.py::test_labels_are_dropped_sample_by_sample_and_as_often_as_asked",
        ),
    ),
    Fault(
        "weights_after_a_grid",
        "Training goes on with its own weights after a grid was drawn from the averaged ones.",
        "pipelines/training/loop/state.py",
        "            torch._foreach_copy_(live, kept)",
        "            pass",
        (
            "tests/pipelines/training/loop/test_train.py"
            "::test_grids_are_drawn_from_averaged_weights_and_leave_training_as_it_was",
        ),
    ),
    Fault(
        "weights_of_a_grid",
        "Grids are drawn from the averaged weights.",
        "pipelines/training/loop/state.py",
        "        torch._foreach_copy_(live, [local_part(t) for t in state.ema.shadow.values()])",
        "        pass",
        (
            "tests/pipelines/training/loop/test_train.py"
            "::test_grids_are_drawn_from_averaged_weights_and_leave_training_as_it_was",
        ),
    ),
    Fault(
        "setting_of_one_side",
        "A run is not resumed with a setting that only it or only the configuration has.",
        "pipelines/checkpoints/files.py",
        "state.identity.keys() | now.keys()",
        "state.identity.keys() & now.keys()",
        (
            "tests/pipelines/checkpoints/test_files.py"
            "::test_a_setting_that_only_one_of_run_and_configuration_has_is_refused_by_name",
        ),
    ),
    Fault(
        "cut_short",
        "A checkpoint with a file that was cut short is not complete.",
        "pipelines/checkpoints/catalog.py",
        "if sizes.get(file) != size]",
        "if file not in sizes]",
        (
            "tests/pipelines/checkpoints/test_catalog.py::test_a_checkpoint_with_a_file_that_was_cut_short_is_not_complete",
        ),
    ),
    Fault(
        "state_json_first",
        "A checkpoint's state.json is uploaded after all its other files.",
        "pipelines/training/loop/checkpoint.py",
        "            for file in state.files:\n",
        "            self.context.job.storage.write(join(uri, layout.TRAINING_STATE), state.to_json().encode())\n"
        "            for file in state.files:\n",
        (
            "tests/pipelines/training/loop/test_checkpoint.py::test_state_json_is_uploaded_once_and_after_all_other_files",
        ),
    ),
    Fault(
        "piece_of_a_part",
        "Every piece of a sharded checkpoint that is read is checked.",
        "pipelines/checkpoints/sharded.py",
        ".hexdigest() != chunk.sha256:",
        ".hexdigest() == chunk.part:",
        ("tests/pipelines/checkpoints/test_sharded.py::test_a_damaged_part_is_refused_by_name",),
    ),
    Fault(
        "rows_of_a_piece",
        "Any number of workers reads from the parts of a checkpoint the rows that it holds.",
        "pipelines/checkpoints/sharded.py",
        ".copy_(values[start - chunk.first : stop - chunk.first])",
        ".copy_(values[: stop - start])",
        (
            "tests/pipelines/checkpoints/test_sharded.py::test_what_any_number_of_ranks_has_written_any_other_number_reads",
        ),
    ),
)
"""Promises that no test kept when the first faults were seeded."""

FAULTS = (*MATHEMATICS, *DATA, *TRAINING, *AROUND, *NEWLY_TESTED)
