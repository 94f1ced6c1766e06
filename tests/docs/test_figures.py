"""The measured figures of the pages are those of the files in benchmarks/results."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import numpy as np
import pytest

from benchmarks.digits.page import cell
from benchmarks.few_steps import STUDENTS
from ddpm.quality import Interval
from tests.docs.modules import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def result(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def performance() -> Iterator[str]:
    """The lines and parts of lines of docs/performance.md that hold a measured figure."""
    yield from training_step("train_step", "ours", "stock", "bf16", "lucidrains")
    yield from training_step("train_step_amx", "ours", "stock", "bf16")
    for compared in ("train_step_methods", "train_step_methods_intel"):
        rate = result(compared)["images_per_s"]
        for arithmetic in ("float32", "bf16"):
            layouts = [f"{arithmetic}, {layout}" for layout in ("contiguous", "channels-last")]
            names = [name for layout in layouts for name in (layout, f"{layout}, compiled")]
            yield row(arithmetic, *(fixed(rate[name], 1) for name in names))

    sampling = result("sampling")
    threads = {1: "one thread", 2: "two threads"}
    samplers = {"ddim": "DDIM", "dpm_solver": "DPM-Solver++", "unipc": "UniPC"}
    for measured in sampling["speed"]:
        rate, ratio = measured["images_per_s"], measured["speedup"]
        ours = ("ours", "ours, bf16", "ours, bf16, compiled")
        rates = (fixed(rate[system], 2) for system in ("diffusers", *ours))
        ratios = (fixed(ratio[system], 2) for system in ours)
        yield row(f"{samplers[measured['sampler']]}, {threads[measured['threads']]}", *rates, *ratios)
    yield f"{max(measured['largest_difference'] for measured in sampling['speed']):.4f} in [-1, 1]"
    costs = sampling["distance"]
    low, high = costs["difference_interval"]
    yield f"{costs['fp32']:.3f} in float32 and {costs['bf16']:.3f} in bf16"
    yield f"a difference of {costs['difference']:.3f} (95 %: {low:.3f} to {high:.3f}, paired)"

    yield from time_to_quality()
    yield from guidance_scales()
    yield from step_profile()

    systems = result("data")["systems"]
    names = ("ours", "webdataset", "mosaicml")
    one, two = ([systems[f"{name}_{cores}"] for name in names] for cores in (1, 2))
    yield row("decoded samples/s, one core, cold", *(f"{s['samples_per_s']:,}" for s in one))
    yield row("one core, shards in the node's cache", *(f"{s['samples_per_s_warm']:,}" for s in one))
    yield row("two cores, cold", *(f"{s['samples_per_s']:,}" for s in two))
    first = (f"{s['first_batch_s_cold']:.2f} / {s['first_batch_s_warm']:.2f}" for s in one)
    yield row("first batch, s, cold / warm", *first)
    resumed = (" / ".join(f"{s['resume_first_batch_s'][at]:.2f}" for at in ("10", "50", "90")) for s in one)
    yield row("first batch after resuming at 10 / 50 / 90 % of an epoch, s", *resumed)
    memory = (f"{a['peak_rss_mib']} / {b['peak_rss_mib']}" for a, b in zip(one, two, strict=True))
    yield row("anonymous memory, MiB, one / two cores", *memory)

    overhead = result("overhead")
    turns = [turn["ratio"] for turn in overhead["one_worker"]]
    ratio = f"{overhead['ratio']:.2f} (single turns: {min(turns):.2f} to {max(turns):.2f})"
    yield row("images/s of one worker with one thread, relative to the bare loop on one thread", ratio)
    missing = "; ".join(f"{100 * overhead['missing'][part]:.1f} %" for part in ("data", "checkpoint", "step"))
    lost = "time lost to: waiting for data; waiting for checkpoints; slower steps (negative: faster)"
    yield row(lost, missing)
    scaling = "images/s of two workers with one thread each, relative to a bare process with two threads"
    yield row(scaling, f"{overhead['scaling']:.2f}")
    beside = "the same relative to two bare processes at once, of one thread each; with the stack's CPU time subtracted"
    yield row(beside, f"{overhead['pair']:.2f}; {overhead['pair_beside_stack']:.2f}")
    stack = "; ".join(f"{100 * overhead['stack_cpu'][workers]:.1f} %" for workers in ("one_worker", "two_workers"))
    yield row("share of both cores that the stack and the driver compute on: with one worker; with two", stack)
    pair, one = (
        statistics.mean(turn[key] for turn in overhead[of])
        for of, key in (("two_workers", "pair"), ("one_worker", "bare"))
    )
    yield f"two processes of one thread are {pair / one:.1f} times as fast"
    scaled = result("overhead_scaling")["cases"]
    threads = scaled["32x32, the same batch for each"]["threads"]
    yield f"{overhead['scaling']:.2f} times on digits with one batch of 128, and {threads:.2f} times on 32x32"
    for name, case in scaled.items():
        cells = (fixed(case[key], 2) for key in ("pair", "pair_beside_stack"))
        yield row(name, f"{case['batch_alone']}", f"{case['batch_together']}", *cells)
    restarts = result("overhead_restarts")
    seconds = f"{restarts['restart_ray_s']:.1f} s; {restarts['restart_ours_s']:.1f} s"
    starting, first = (statistics.median(each[kind] for each in restarts["restarts"]) for kind in ("startup", "step"))
    yield f"{starting:.1f} s pass before the first step"
    yield f"The first step takes {first:.1f} s"
    killed = "from SIGKILL of a worker until Ray starts the new one; from there to the end of its first step"
    yield row(f"{killed} (medians of {len(restarts['restarts'])})", seconds)


def training_step(name: str, *kinds: str) -> Iterator[str]:
    """The rows of a table of training steps; the first of these systems is ours."""
    models = result(name)["models"]
    small, large = (models[size]["images_per_s"] for size in ("6.5M", "35.7M"))
    yield row("6.5 M parameters, batch 32", *(fixed(small[kind], 1) for kind in kinds))
    yield row("35.7 M parameters, batch 16", *(fixed(large[kind], 2) for kind in kinds))
    pairs = [[models[size][f"speedup_{kind}"] for size in ("6.5M", "35.7M")] for kind in kinds[1:]]
    yield "| ours is ahead by | | " + " | ".join(f"{one:.2f}, {other:.2f}" for one, other in pairs) + " |"


def time_to_quality() -> Iterator[str]:
    """The table and the sentences of medians over seeds."""
    measured = result("time_to_quality")
    for found in measured["data"].values():
        budgets = [f"{budget:.0f}" for budget in found["budgets_s"]]

        def median(side: str, budget: str, key: str, found: dict[str, Any] = found) -> float:
            return statistics.median(row[key] for row in found[side] if f"{row['budget_s']:.0f}" == budget)

        for budget in budgets:
            distances = (fixed(median(side, budget, "distance"), 2) for side in ("ours", "peer"))
            yield row(f"distance after {budget} s", *distances, f"{found['peer_over_ours'][budget]:.1f}")
            shares = (f"{100 * median(side, budget, 'accuracy'):.1f} %" for side in ("ours", "peer"))
            yield row(f"samples of the class that was asked for, {budget} s", *shares, "")
        yield f"the distance {fixed(found['judge']['floor'], 2)}"
        yield f"in {budgets[-1]} s it has trained on {median('peer', budgets[-1], 'images'):,.0f} images"
        took = [f"{median('ours', budget, 'seconds'):.0f} s of the {budget}" for budget in budgets]
        yield f"it took {took[0]} and {took[1]}"
        yield f"it trains on {median('ours', budgets[-1], 'images'):,.0f} images"
        trials = {(t["prediction"], t["lr"]): t["distance"] for t in found["peer_trials"]}
        yield " and ".join(fixed(trials["eps", lr], 0) for lr in (0.0003, 0.001))
        yield " and ".join(fixed(trials["v", lr], 1) for lr in (0.0003, 0.001))


def guidance_scales() -> Iterator[str]:
    """The rows of models that were drawn with several scales: of each training, and the medians."""
    for found in result("guidance_scales")["data"].values():
        for scale in sorted({each["scale"] for each in found["rows"]}):
            rows = [each for each in found["rows"] if each["scale"] == scale]
            distances, accuracies, recalls = (
                [each[key] for each in rows] for key in ("distance", "accuracy", "recall")
            )
            shares = (f"{100 * accuracy:.1f} %" for accuracy in accuracies)
            median = fixed(statistics.median(distances), 2), f"{100 * statistics.median(accuracies):.1f} %"
            yield row(
                f"{scale:g}",
                ", ".join(fixed(distance, 2) for distance in distances),
                median[0],
                ", ".join(shares),
                median[1],
                fixed(statistics.median(recalls), 2),
            )
    for each in result("guidance_scales_stamps")["rows"]:
        distance, accuracy = each["frechet_distance"], each["class_accuracy"]
        low, high = (fixed(distance[end], 1) for end in ("low", "high"))
        ends = " to ".join(f"{100 * accuracy[end]:.0f}" for end in ("low", "high"))
        share = f"{100 * accuracy['value']:.0f} % ({ends})"
        yield row(f"{each['scale']:g}", f"{fixed(distance['value'], 1)} ({low} to {high})", share)


def step_profile() -> Iterator[str]:
    measured = [result(name)["models"] for name in ("step_profile", "step_profile_amx")]
    models = [machine[name] for machine in measured for name in ("6.5M", "35.7M")]
    for kind in models[0]["shares"]:
        yield row(kind, *(f"{100 * model['shares'][kind]:.1f} %" for model in models))
    others = [f"{100 * model['others']:.0f} %" for model in models]
    assert others[0::2] == others[1::2]
    yield f"is {others[0]} of either step, and {others[2]} with AMX"
    contiguous, last = (result(f"step_profile_amx{layout}")["models"]["6.5M"] for layout in ("", "_channels_last"))
    for kinds, text in (
        (("convolutions", "copies and casts"), "s of the smaller network's step instead of"),
        (("group norm",), "s instead of"),
    ):
        seconds = [fixed(sum(m["shares"][kind] for kind in kinds) * m["step_s"], 2) for m in (last, contiguous)]
        yield f"{seconds[0]} {text} {seconds[1]}"


def serving() -> Iterator[str]:
    measured = result("serving")
    systems = [measured["systems"][name] for name in ("ddpm", "ddpm_invocations", "mlflow")]
    yield row("images/s", *(f"{s['images_per_s']:.1f}" for s in systems))
    yield row("half of the answers within, s", *(f"{s['p50_s']:.1f}" for s in systems))
    yield row("99 % of the answers within, s", *(f"{s['p99_s']:.1f}" for s in systems))
    yield row("lost, or another picture", *(str(s["lost"] + s["mixed_up"]) for s in systems))
    yield f"a network batch holds {measured['pictures_of_a_batch']:.0f} pictures on average"
    yield f"(99 % within {measured['replica_killed']['p99_s']:.1f} s then)"
    least, most = measured["memory_mib"]
    yield f"grew from {least:,.0f} to {most:,.0f} MiB"


def search() -> Iterator[str]:
    replay, trials = result("search"), result("trials")
    for name, title in (("optuna", "Optuna (the first 10 are random)"), ("random", "random")):
        system = replay["systems"][name]
        shares = [system[f"hypervolume_{count}"] for count in (10, 20, 40)]
        yield row(
            title, *(f"{share:.2f}" if share < 0.99 else f"{share:.3f}" for share in shares), f"{system['trials_to']:g}"
        )
    yield f"Optuna is ahead in {replay['ahead'].replace(' of ', ' of the ')} replays"
    yield f"Random search needs {replay['speedup_random']:.1f} times as many trials to reach 90 %"
    for system in replay["systems"].values():
        yield f"the lowest distance is {system['distance_10']:.2f}, and after 40 it is {system['distance_40']:.2f}"
    yield f"a further trial costs {trials['overhead_s']['ours']:.1f} s"
    yield f"({min(trials['turns']['ours']):.1f} to {max(trials['turns']['ours']):.1f} in three repetitions)"
    parts = [trials["trial_seconds"][part] for part in ("placement", "start-up", "checkpoints", "teardown")]
    yield "placement {:.1f} s, start-up {:.1f}, checkpoints {:.1f}, teardown {:.1f}".format(*parts)
    yield f"costs {trials['overhead_s']['usual']:.1f} s"
    yield from studies()
    base, eps = (with_error(result("methods")["methods"][name], "distance") for name in ("base", "eps"))
    yield f"distance {base} with v, {eps} with eps"
    rows = result("schedules")["methods"]
    cosine, linear, sigmoid = (with_error(rows[name], "distance") for name in ("base", "linear", "sigmoid"))
    yield f"distance {cosine} with cosine, {linear} with linear, {sigmoid} with sigmoid"
    mnist, both = result("methods_mnist")["methods"], "learned_weight+muon"
    plain, difference = mnist["sigmoid"], "difference_to_base"
    gain = with_error({**plain, difference: -plain[difference]}, difference)
    of = fixed(mnist["base"]["distance"], 2)
    planned, shifted = (with_error(mnist[name], "distance") for name in (both, f"sigmoid+{both}"))
    yield f"sigmoid is better by {gain} of {of}"
    yield f"it is not ({shifted}, cosine {planned})"
    yield f"distance {planned} instead of {with_error(mnist['base'], 'distance')}"
    digits = result("methods")["methods"]
    yield f"digits: {with_error(digits[both], 'distance')} instead of {with_error(digits['base'], 'distance')}"
    photographs = (with_error(result("methods_cifar10")["methods"][name], "distance") for name in (both, "base"))
    yield "photographs, two of each: {} instead of {}".format(*photographs)


def studies() -> Iterator[str]:
    """The two studies of docs/search.md: what they tried, and what judging the best of them again found."""
    for kind, study in result("studies")["studies"].items():
        trials = {trial["trial"]: trial for trial in study["trials"]}
        states = [trial["state"] for trial in trials.values()]
        ended = f"{study['wall_s']:.0f} s: {states.count('finished')} ran to their end"
        yield f"{ended}, {'ASHA stopped ' if kind == 'training' else ''}{states.count('stopped')}"
        for each in study["confirmation"]["confirmed"]:
            scores, gain = each["scores"], each["gain"]
            cells = [fixed(each["distance"]["value"], 2)]
            if gain is None:
                cells += ["", ""]
            else:
                value, low, high = (fixed(gain[name], 2) for name in ("value", "low", "high"))
                cells += [f"{value} ({low} to {high})", "yes" if each["better"] else "no"]
            if kind == "guidance":
                rates = (fixed(scores[name], 3) for name in ("class_accuracy", "precision", "recall"))
                yield row(described(each), *cells, fixed(scores["evaluations"], 0), *rates).replace("|  |", "| |")
            else:
                drawn = each["params"]["objective.timesteps"]
                yield row(trained_with(each), drawn, *cells, fixed(scores["class_accuracy"], 3)).replace("|  |", "| |")
        if kind == "guidance":
            cheap, near = (trials[study["pareto_front"][end]]["scores"] for end in (0, -1))
            yield f"The Pareto front goes from {cheap['evaluations']:.0f} network evaluations at distance"
            far = fixed(cheap["frechet_distance"], 2)
            yield f"{far} to {near['evaluations']:.0f} at {fixed(near['frechet_distance'], 2)}"
            (own,) = (t["scores"] for t in trials.values() if t["params"] == OWN_SETTING)
            first, second, _, default = study["confirmation"]["confirmed"]
            lost = [default["scores"]["class_accuracy"] - each["scores"]["class_accuracy"] for each in (first, second)]
            yield f"{fixed(100 * lost[0], 1)} and {fixed(100 * lost[1], 1)} points less"
            gap = second["distance"]["value"] - first["distance"]["value"]
            assert gap < min(each["scores"]["standard_error"] for each in (first, second))
            errors = (fixed(each["scores"]["standard_error"], 2) for each in (first, second))
            yield f"{fixed(gap, 2)}, less than the standard error of either distance ({' and '.join(errors)})"
            yield f"needs {own['evaluations']:.0f} for {fixed(own['frechet_distance'], 2)}"
        else:
            seen = sum(trial["scores"]["images_seen"] for trial in trials.values())
            yield f"saw {seen:,.0f} images instead of {25_600 * len(trials):,}"
            by_v = [t for t in trials.values() if t["params"]["objective.prediction"] == "v"]
            finished = [t for t in trials.values() if t["state"] == "finished"]
            assert all(t in finished and t["params"]["schedule.kind"] == "cosine" for t in by_v)
            assert all(t["params"]["objective.timesteps"] == "stratified" for t in by_v)
            distances = sorted(t["scores"]["frechet_distance"] for t in by_v)
            yield f"at distances of {fixed(distances[0], 2)} to {fixed(distances[-1], 2)} on 256"
            rest = [t["scores"]["frechet_distance"] for t in finished if t not in by_v]
            yield f"at {fixed(min(rest), 2)} and {fixed(max(rest), 2)}"
            assert (len(by_v), len(rest), len(trials)) == (8, 2, 16)


OWN_SETTING = {
    "guidance.scale": 1.5,
    "guidance.interval.0": 0.0,
    "guidance.interval.1": 1.0,
    "guidance.rescale": 0.0,
    "sampler.kind": "ddim",
    "sampler.steps": 50,
    "sampler.eta": 0.0,
}


def described(each: dict[str, Any]) -> str:
    if each["trial"] == "default":
        return "the model's own"
    setting = each["settings"]
    assert setting["kind"] == "ddim"
    low, high = (fixed(end, 2) for end in setting["interval"])
    scale, eta, rescale = (fixed(setting[name], 2) for name in ("scale", "eta", "rescale"))
    return f"DDIM, {setting['steps']} steps, eta {eta}, scale {scale} between {low} and {high} of T, rescale {rescale}"


def trained_with(each: dict[str, Any]) -> str:
    setting = each["params"]
    shift, drop = setting["schedule.log_snr_shift"], fixed(setting["objective.label_drop"], 2)
    rate = fixed(setting["optim.lr"], 4)
    if each["trial"] == "default":
        return f"as it stands: cosine, eps, shift {shift:g}, label drop {drop}, learning rate {rate}"
    assert (setting["schedule.kind"], setting["objective.prediction"]) == ("cosine", "v")
    return f"cosine, v, log-SNR shift {fixed(shift, 2)}, label drop {drop}, learning rate {rate}"


def gate() -> Iterator[str]:
    measured = result("gate")
    yield f"the floor of real test images is {measured['floor']:.1f}"
    type_i, attempts = measured["type_i"], measured["attempts"]
    asked = f"{type_i['comparisons']:,}"
    equal = f"two versions that are equally good, on the same labels and noise, n = {type_i['n']}"
    yield row(equal, asked, str(type_i["paired"]))
    yield row("the same on other noise for each", asked, str(type_i["unpaired"]))
    series = f"series of {attempts['length']} equally good versions against one champion: series in which one passes"
    yield row(series, f"{attempts['series']:,}", str(attempts["with_a_pass"]))
    for n, title in ((359, "359"), (2000, "2,000"), (5000, "5,000 (default)")):
        points = sorted((each["power"], each["difference"]) for each in measured["power"] if each["n"] == n)
        difference = float(np.interp(0.9, *zip(*points, strict=True)))
        places = 1 if difference >= 1 else 2
        yield row(title, f"{difference:.{places}f}", f"{100 * difference / measured['floor']:.0f} %")


def digits() -> Iterator[str]:
    """The tables of docs/digits.md, in the form that `python -m benchmarks.digits` writes them."""
    measured = result("digits")
    yield f"{measured['train']:,} for training, {measured['test']} for testing"
    yield f"`digits` ({measured['parameters']:,} parameters)"
    yield f"trained on {measured['images']['classes']:,} images"
    for name in ("guidance", "inpainting", "text"):
        rows = [{key: as_interval(value) for key, value in each.items()} for each in measured[name]]
        columns = [key for key in dict.fromkeys(key for each in rows for key in each) if key != "name"]
        for each in rows:
            yield row(each["name"], *(cell(each[key]) if key in each else "" for key in columns)).replace("|  |", "| |")
    for score in ("Frechet distance", "class accuracy"):
        found = {(each["name"], each["budget"]): cell(as_interval(each[score])) for each in measured["samplers"]}
        budgets = sorted({budget for _, budget in found})
        for name in dict.fromkeys(name for name, _ in found):
            yield row(name, *(found.get((name, budget), "") for budget in budgets))
    for name, value in measured["likelihood"].items():
        yield f"| {name} | {cell(as_interval(value))} | "
    ode = measured["ode"]
    yield f"from t = {ode['t_min']:.3f}, where sigma = 0.001"
    yield f"at most {ode['truncation_cost']:.2f} bits"


def as_interval(value: Any) -> Any:
    return Interval(**value | {"n": tuple(value["n"])}) if isinstance(value, dict) else value


def comparison() -> Iterator[str]:
    rows = few_step_rows()
    for title, key in [
        ("diffusion, ancestral (the whole chain)", ("teacher", "ancestral", 1000)),
        ("diffusion, DDIM", ("teacher", "ddim trailing", 50)),
        ("diffusion, DDIM", ("teacher", "ddim trailing", 4)),
        ("diffusion, DDIM", ("teacher", "ddim trailing", 1)),
        ("diffusion, DPM-Solver++", ("teacher", "dpm_solver trailing", 8)),
        ("diffusion, learned steps", ("teacher", "unipc learned", 4)),
        ("diffusion, learned steps", ("teacher", "unipc learned", 3)),
        ("diffusion, learned steps", ("teacher", "unipc learned", 2)),
        ("consistency model", ("student", "consistency", 2)),
        ("consistency model", ("student", "consistency", 1)),
        ("GAN", ("gan", "one pass", 1)),
        ("VAE", ("vae", "one pass", 1)),
    ]:
        yield judged(title, rows[key])
    worse = {
        "GAN": ("gan", "one pass", 1),
        "VAE": ("vae", "one pass", 1),
        "consistency model": ("student", "consistency", 1),
    }
    intervals = {title: rows[key]["difference_interval"] for title, key in worse.items()}
    yield ", ".join(f"{title} {low:.2f} to {high:.2f}" for title, (low, high) in intervals.items())
    bits = result("few_steps")["bits_per_dim"]
    yield f"is {bits['teacher']:.2f} for the diffusion model"
    yield f"{bits['vae']:.2f} for the VAE"
    speed = {evaluations: rows["teacher", "ddim trailing", evaluations]["images_per_s"] for evaluations in (1, 50)}
    yield f"({speed[1]:,.0f} in one, {speed[50]:.0f} in 50)"


def few_step_rows(name: str = "few_steps") -> dict[tuple[str, str, int], dict[str, Any]]:
    return {(r["model"], r["sampler"], r["evaluations"]): r for r in result(name)["rows"]}


def few_steps() -> Iterator[str]:
    names = {"ancestral": "ancestral", "ddim": "DDIM", "dpm_solver": "DPM-Solver++", "unipc": "UniPC"}
    for each in result("sampling")["few_steps"]:
        rates = (f"{float(f'{each[key]:.3g}'):,g}" for key in ("images_per_s_batch_1", "images_per_s_batch_64"))
        yield row(names.get(each["sampler"], "consistency"), str(each["steps"]), *rates)
    for name, counts, solvers in (
        ("few_steps", (2, 3, 4, 6, 8, 10), {"ddim": "DDIM", "dpm_solver": "DPM-Solver++", "unipc": "UniPC"}),
        ("few_steps_mnist", (2, 4), {"unipc": "UniPC"}),
    ):
        rows = few_step_rows(name)
        for solver, title in solvers.items():
            for how in ("trailing", "karras", "chosen", "learned"):
                found = [rows["teacher", f"{solver} {how}", count]["distance"] for count in counts]
                yield row(f"{title}, {how}", *(f"{distance:.2f}" for distance in found))
        learned = [rows["teacher", "unipc learned", count] for count in counts[:3]]
        yield from (f"by {compared(r)}" for r in learned)
    yield from larger_students()
    yield from students()
    yield from costs()
    rows = few_step_rows()
    finest = rows["teacher", "dpm_solver trailing", 100]["distance"]
    yield f"it is {rows['teacher', 'ddim trailing', 50]['distance']:.2f}, with DPM-Solver++ in 100 {finest:.2f}"
    seconds = [r["learned_in_s"] for r in rows.values() if "learned_in_s" in r]
    yield f"took {min(seconds):.0f} to {max(seconds):.0f} seconds"


def compared(r: dict[str, Any]) -> str:
    """The difference from the teacher's fine steps, with its interval."""
    low, high = r["difference_interval"]
    return f"{r['difference']:.2f} ({low:.2f} to {high:.2f})"


def students() -> Iterator[str]:
    """The table of ways to tune a consistency model, and what is said of the best."""
    rows = few_step_rows("few_steps_students")
    fine = rows["teacher", "ddim trailing", 50]
    for way in STUDENTS:
        found = [rows[way, "consistency", count] for count in (1, 2, 4)]
        yield row(way, *(fixed(each["distance"], 2) for each in found), f"{found[1]['class_accuracy']:.3f}")
    yield row("teacher, DDIM in 50", "", "", fixed(fine["distance"], 2), f"{fine['class_accuracy']:.3f}")
    best = rows["muon, trajectories of the teacher", "consistency", 2]
    yield f"by {compared(best)}, {best['distance'] / fine['distance']:.1f} times"


def larger_students() -> Iterator[str]:
    """The tables of students of larger pictures beside their teachers."""
    for name in ("few_steps_mnist", "few_steps_cifar10"):
        rows = few_step_rows(name)
        for model, sampler, title in (
            ("student", "consistency", "student, consistency"),
            ("teacher", "unipc learned", "teacher, learned steps"),
            ("teacher", "unipc trailing", "teacher, UniPC"),
            ("teacher", "unipc karras", "teacher, UniPC, karras"),
            ("teacher", "ddim trailing", "teacher, DDIM"),
            ("teacher", "ddim unguided", "teacher, DDIM, unguided"),
        ):
            found = [(count, r) for count in (1, 2, 4, 50) if (r := rows.get((model, sampler, count)))]
            for i, (count, r) in enumerate(found):
                cells = (f"{r['distance']:.2f}", compared(r) if r["difference"] else "", f"{r['class_accuracy']:.3f}")
                yield row("" if i else title, str(count), *cells)


def costs() -> Iterator[str]:
    """The tables of longer and shorter tunings."""
    for name in ("few_steps_costs", "few_steps_mnist_costs"):
        rows = few_step_rows(name)
        for model, training in result(name)["trainings"].items():
            if model != "teacher":
                found = [rows[model, "consistency", count]["distance"] for count in (1, 2, 4)]
                distances = (fixed(distance, 2) for distance in found)
                yield row(
                    f"{training['images']:,}", fixed(training["cost"], 2), f"{training['seconds']:.0f}", *distances
                )


def evaluation() -> Iterator[str]:
    measured = result("overhead_evaluation")
    without, with_ = (
        statistics.median(t["worker_cpu_s_per_1000"] for t in measured[side]) for side in ("without", "with")
    )
    yield f"(medians of {with_:.3f} and {without:.3f} for 1,000 images"
    singles = [turn["worker_cpu_s_per_1000"] for turn in measured["without"]]
    yield f"single trainings from {min(singles):.2f} to {max(singles):.2f} without"
    yield f"the driver {measured['driver_cpu_s_per_evaluation']:.2f} CPU seconds more for each evaluation"
    yield f"{100 * measured['driver_cpu']:.1f} % of the worker's"
    yield f"images/s were {100 * (1 - measured['images_per_s_ratio']):.0f} % fewer"
    yield f"in each training of {measured['images_per_turn']:,} images"
    found = result("evaluators")
    changes = ("copies", "blurred", "noisy", "no_3", "no_3_no_5")
    for name, e in found["evaluators"].items():
        shown = f"**{name}**" if name in ("classifier, half", "contrastive, half") else name
        multiples = (fixed(e[change], 2) for change in changes)
        yield row(shown, fixed(e["known"], 3), fixed(e["floor"], 2), *multiples, fixed(e["noise_alone"], 0))
    half = found["evaluators"]["classifier, half"]
    group, gain = found["group"], "gain_of_shown"
    yield f"have the distance {fixed(half['shown_to_unseen'], 2)} from {group} unseen ones"
    yield f"and {group} other unseen images {fixed(half['unseen_to_unseen'], 2)}"
    yield f"the difference is {with_error({**half, gain: -half[gain]}, gain)}, with its standard error"


def methods() -> Iterator[str]:
    found = result("methods")
    schedules = {"cosine" if name == "base" else name: each for name, each in result("schedules")["methods"].items()}
    for name, each in [*found["methods"].items(), *schedules.items()]:
        if each["seeds"] == 3:
            keys = [key for key in ("distance", "difference_to_base") if key in each]
            cells = [with_error(each, key) for key in keys]
            yield row(name, *cells, *[""] * (2 - len(cells))).replace("  |", " |")
    for measured in (measured for measured in found["rows"] if measured["seed"] == 0):
        low, high = measured["interval"]
        interval = f"{fixed(low, 2)} to {fixed(high, 2)}"
        accuracy = fixed(measured["class_accuracy"], 3)
        yield row(measured["method"], fixed(measured["distance"], 2), interval, accuracy)
    mnist = result("methods_mnist")
    for name, each in mnist["methods"].items():
        rows = [measured for measured in mnist["rows"] if measured["method"] == name]
        difference = with_error(each, "difference_to_base") if name != "base" else ""
        accuracy = fixed(statistics.mean(measured["class_accuracy"] for measured in rows), 3)
        yield row(name, with_error(each, "distance"), difference, accuracy).replace("|  |", "| |")
    slower, quicker = (
        sum(measured["train_s"] for measured in mnist["rows"] if measured["method"] == name)
        for name in ("learned_weight+muon", "learned_weight")
    )
    for name, each in result("methods_cifar10")["methods"].items():
        keys = ("distance", "difference_to_base") if name != "base" else ("distance",)
        cells = [with_error(each, key) if each["seeds"] > 1 else fixed(each[key], 2) for key in keys]
        yield row(name, *cells, *[""] * (2 - len(cells))).replace("|  |", "| |")
    rates = {row["method"]: fixed(row["distance"], 2) for row in result("methods_mnist_rates")["rows"]}
    lr, both = "optim.lr=", "objective.learned_weight=true+optim.kind=muon+optim.lr="
    adamw, muon = (
        [rates[name] for name in names]
        for names in ((f"{lr}0.0005", "base", f"{lr}0.002"), ("learned_weight+muon", f"{both}0.002", f"{both}0.004"))
    )
    yield "AdamW ends at {}, {} and {} with rates of 0.0005, 0.001 and 0.002".format(*adamw)
    yield "at {}, {} and {} with 0.001, 0.002 and 0.004".format(*muon)
    yield f"0.0007 gives {rates[both.replace('optim.lr', 'batch_size=16+optim.lr') + '0.0007']}"
    yield f"a step takes {100 * (slower / quicker - 1):.0f} % longer"


def failures() -> Iterator[str]:
    cells = result("faults")["cells"]
    hits, lost = (sum(cell[of] for cell in cells) for of in ("hits", "lost"))
    yield f"had {len(cells)} pairs of a fault and one of these, {hits:,} requests that met a fault, and {lost} losses"
    measured = result("soak")
    faults, ledger, seconds = measured["faults"], measured["ledger"], sum(p["seconds"] for p in measured["parts"])
    count = sum(faults.values())
    assert count == sum(part["faults"] for part in measured["parts"])
    yield f"for {seconds / 60:.0f} minutes with a fault every {seconds / count:.0f} seconds on average"
    yield f"| {count} faults |"
    yield row("connections to S3 disturbed, to MLflow disturbed", f"{faults['disturb_s3']}, {faults['disturb_mlflow']}")
    yield row("S3, MLflow killed", f"{faults['kill_s3']}, {faults['kill_mlflow']}")
    lost = ", ".join(str(faults[kind]) for kind in ("kill_worker", "bounce_node", "kill_driver"))
    yield row("workers, nodes, drivers killed", lost)
    wrong = (measured["batches_missing_or_twice"], measured["losses_that_differ_from_the_undisturbed_run"])
    yield f"of {measured['images_at_the_last_fault'] / 1e6:.1f} million images;"
    yield "by more than 0.1 % | {}; {} |".format(*wrong)
    starts = f"{ledger['starts_of_the_workers']}, {ledger['starts_of_the_driver']}"
    yield row("starts of the workers, of the driver", starts)
    shares = [ledger[part] / ledger["wall_s"] for part in ("productive_s", "restart_s", "recomputed_s", "idle_s")]
    yield "computed twice; no driver running | " + "; ".join(f"{100 * share:.0f} %" for share in shares) + " |"


SHUFFLED = {
    "full shuffle": "full shuffle",
    "ours, 16 lanes, window 8": "16 lanes, window 8 (`data=folder`)",
    "ours, 8 lanes, window 4": "8 lanes, window 4",
    "WebDataset, 16 readers": "WebDataset, `shardshuffle=100`, `shuffle(1000)`, 16 readers",
    "WebDataset, 1 reader": "the same, 1 reader",
    "storage order": "as stored",
}


def datasets() -> Iterator[str]:
    rows = result("shuffle")["rows"]
    for system, title in SHUFFLED.items():
        few, many = (each for each in rows if each["system"] == system)
        cells = [
            (
                f"{fixed(r['class_distance'], 2)} ({fixed(r['classes_per_batch'], digits)})",
                f"{r['largest_correlation']:.2f}",
            )
            for r, digits in ((few, 1), (many, 0))
        ]
        yield row(title, *(cell for pair in cells for cell in pair))


def row(title: str, *cells: str) -> str:
    return f"| {title} | " + " | ".join(cells) + " |"


def fixed(value: float, digits: int) -> str:
    """Round as people do: 25.95, which no binary number is, to 26.0."""
    return str(Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def with_error(each: dict[str, Any], key: str) -> str:
    return f"{fixed(each[key], 2)} ± {fixed(each[f'{key}_standard_error'], 2)}"


def judged(title: str, r: dict[str, Any]) -> str:
    scores = (f"{r['distance']:.2f} ± {r['standard_error']:.2f}", f"{r['precision']:.2f}", f"{r['recall']:.2f}")
    return row(title, str(r["evaluations"]), *scores, f"{r['class_accuracy']:.3f}")


PAGES: dict[str, Callable[[], Iterator[str]]] = {
    "performance": performance,
    "serving": serving,
    "search": search,
    "registry": gate,
    "digits": digits,
    "comparison": comparison,
    "few-steps": few_steps,
    "evaluation": evaluation,
    "failures": failures,
    "training-methods": methods,
    "datasets": datasets,
}


@pytest.mark.parametrize("page", PAGES)
def test_the_figures_of_a_page_are_those_of_its_files(page):
    text = flat((ROOT / "docs" / f"{page}.md").read_text())
    figures = [flat(figure) for figure in PAGES[page]()]
    assert len(figures) >= 4
    missing = [figure for figure in figures if figure not in text]
    assert not missing, "\n".join(missing)


def test_every_file_of_results_that_a_page_links_is_compared():
    linked = {
        (page.stem, name)
        for page in (ROOT / "docs").glob("*.md")
        for name in re.findall(r"benchmarks/results/([\w-]+)\.json", page.read_text())
    }
    assert len(linked) > 8
    assert {page for page, _ in linked} == PAGES.keys()


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)
