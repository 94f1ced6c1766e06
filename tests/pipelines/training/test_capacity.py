"""Whether a training fits, and the setting that makes it fit: found by estimating it with that setting."""

from __future__ import annotations

import pytest

from pipelines.config import ConfigError, compose
from pipelines.environment.limits import NODE_FOLDER, NodeLimits
from pipelines.training.capacity import compare, placement_of, require_room
from pipelines.training.memory import GIB, MIB, estimate

DIT = ("model=dit_small", "model.width=64", "model.depth=3", "model.heads=2")
WIDE = ("model=dit_small", "model.width=512", "model.depth=2", "model.heads=8")


def config_of(*overrides):
    plain = ["+experiment=digits", "storage=file", "storage.root=file:///nowhere", "cluster.gpus_per_worker=1"]
    return compose([*plain, "cluster.num_workers=4", "data.image_size=32", "batch_size=1024", *overrides])


def device(config, limit):
    """Return what is found of the memory of GPUs with this many bytes."""
    return next(each for each in compare(config, placement_of(config), NodeLimits("here", device=limit)))


def needed(config):
    return sum(estimate(config, placement_of(config)).device.values())


@pytest.mark.parametrize(
    "overrides, part, setting",
    [
        (DIT, "activations", "micro_batch_size="),
        ((*WIDE, "micro_batch_size=8"), "activations", "model.checkpointing=true"),
        ((*WIDE, "micro_batch_size=1", "model.checkpointing=true"), "optimizer", "cluster.parallel=fsdp"),
    ],
)
def test_the_setting_that_is_named_makes_the_training_fit(overrides, part, setting):
    config = config_of(*overrides)
    limit = needed(config) - 0.4 * estimate(config, placement_of(config)).device[part]
    found = device(config, limit)
    assert found.verdict in ("tight", "too large")
    assert setting in found.remedy
    words = [word for word in found.remedy.partition(" or ")[0].split() if "=" in word]
    assert needed(config_of(*overrides, *words)) <= limit


def test_more_workers_are_named_where_no_setting_of_these_workers_is_enough():
    config = config_of(*WIDE)
    context = estimate(config, placement_of(config)).device["context"]
    found = device(config, context + 150 * MIB)
    assert found.verdict == "too large"
    assert "cluster.parallel=fsdp" in found.remedy
    assert "cluster.num_workers=" in found.remedy


def test_only_what_surely_does_not_fit_is_refused_and_the_check_can_be_left_out():
    config = config_of(*DIT)
    whole = needed(config)
    placement = placement_of(config)
    assert device(config, None).verdict == device(config, whole).verdict == "fits"
    (tight, *_) = require_room(config, placement, NodeLimits("here", device=0.9 * whole))
    assert tight.verdict == "tight"
    with pytest.raises(ConfigError, match=r"memory of a GPU of here.*micro_batch_size=.*cluster\.check_memory=false"):
        require_room(config, placement, NodeLimits("here", device=0.7 * whole))
    unchecked = config_of(*DIT, "cluster.check_memory=false")
    assert require_room(unchecked, placement, NodeLimits("here", device=0.5 * whole)) == []


def test_copies_that_wait_for_a_store_that_is_away_refuse_nothing_but_are_named():
    config = config_of(*WIDE)
    parts = estimate(config, placement_of(config)).node
    limit = sum(parts.values()) - parts["backlog"] // 2
    (node,) = [each for each in compare(config, placement_of(config), NodeLimits("here", node=limit)) if each.remedy]
    assert (node.place, node.verdict) == ("node", "tight")
    assert "checkpoint.backlog=0" in node.remedy


def test_a_compiled_network_is_refused_only_where_half_of_its_activations_do_not_fit():
    plain, compiled = config_of(*DIT), config_of(*DIT, "cluster.compile=true")
    limit = 0.8 * needed(plain)
    assert device(plain, limit).verdict == "too large"
    assert device(compiled, limit).verdict == "tight"


def test_the_memory_of_a_pod_is_raised_by_its_setting():
    config = config_of(*WIDE)
    limits = NodeLimits("a pod", node=2 * GIB, settings={"node": "launch.memory_gib"})
    (node,) = [each for each in compare(config, placement_of(config, 2), limits) if each.place == "node"]
    size = int(node.remedy.removeprefix("launch.memory_gib=").split()[0])
    assert 2 * (size - 1) * GIB < sum(node.needed.values()) <= 2 * size * GIB


def test_copies_on_nodes_need_shared_memory_and_each_place_of_a_pod_is_raised_by_its_setting():
    config = config_of(*WIDE, "checkpoint.local_every=64")
    needed = estimate(config, placement_of(config, 2))
    settings = {"shared": "launch.shm_gib", "disk": "launch.disk_gib"}
    limits = NodeLimits("a pod", shared=1.0, disk=1.0, settings=settings)
    found = {each.place: each for each in compare(config, placement_of(config, 2), limits)}
    assert found["shared"].needed == {"local copies": needed.node["local copies"]}
    for place, workers in {"shared": 2, "disk": 1}.items():
        assert found[place].verdict == "too large"
        size = int(found[place].remedy.removeprefix(f"{settings[place]}=").split()[0])
        assert workers * (size - 1) * GIB < sum(found[place].needed.values()) <= workers * size * GIB
    (here,) = [each for each in compare(config, placement_of(config, 2), NodeLimits("here", shared=1.0)) if each.remedy]
    assert NODE_FOLDER in here.remedy
    none = config_of(*WIDE)
    assert "shared" not in [each.place for each in compare(none, placement_of(none), limits)]


def test_sharded_checkpoints_need_no_temporary_files():
    places = [each.place for each in compare(config_of(*DIT), placement_of(config_of(*DIT)), NodeLimits("here"))]
    assert "disk" in places
    sharded = config_of(*DIT, "cluster.parallel=fsdp")
    assert "disk" not in [each.place for each in compare(sharded, placement_of(sharded), NodeLimits("here"))]
