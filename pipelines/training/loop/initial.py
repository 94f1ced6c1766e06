"""The model that `init_from` names: weights that a run starts from, and the teacher of a consistency model."""

from __future__ import annotations

from dataclasses import replace

import torch

from ddpm.consistency import ConsistencyTuning
from ddpm.guidance import ClassifierFree
from ddpm.prediction import NetworkDenoiser, Parameterization
from pipelines.checkpoints import ModelError
from pipelines.checkpoints.references import InitialModel, initial_model
from pipelines.training.loop.collectives import broadcast, from_rank_0
from pipelines.training.loop.context import RunContext
from pipelines.training.loop.hardware import place_network, weight_dtype
from pipelines.training.loop.state import TrainingState, load_weights, make_network


def load_initial_model(context: RunContext, state: TrainingState) -> None:
    """Start a fine-tuning from the weights that `init_from` names, averages included; called by every rank.

    Raises:
        ModelError: there is no such model, or it is of another network.
    """
    found, _ = _read(context)
    load_weights(state, {} if found is None else found.weights, context.device)


def with_teacher(context: RunContext) -> RunContext:
    """Return the context with the model whose trajectories are learned, where the objective asks for one.

    It is the `init_from` model on every rank, whole; called by every rank.

    Raises:
        ModelError: the model is gone, or `init_from` names other weights than when the run began.
    """
    objective = context.objective
    if not isinstance(objective, ConsistencyTuning) or objective.guidance is None:
        return context
    found, prediction = _read(context)
    with torch.random.fork_rng(devices=[]):
        network = make_network(context.config)
    network = place_network(network.to(weight_dtype(context.config.optim)), context.config, context.device)
    tensors = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    broadcast({} if found is None else found.weights, tensors, context.device)
    network.eval().requires_grad_(False)
    plain = NetworkDenoiser(network, context.schedule, prediction)
    return replace(context, teacher=ClassifierFree(scale=objective.guidance).wrap(plain, context.schedule))


def _read(context: RunContext) -> tuple[InitialModel | None, Parameterization]:
    """Return the model on rank 0 and None on the others, and on every rank what its network predicts.

    Raises:
        ModelError: as for `initial_model`, on every rank; or the model is another one than when the run began.
    """
    found: InitialModel | None = None

    def read() -> Parameterization:
        nonlocal found
        found = initial_model(context.config, context.job.tracker.uri)
        began = context.spec.lineage.get("init_from_digest", found.digest)
        if found.digest != began:
            raise ModelError(
                f"init_from = {context.config.init_from} names other weights ({found.digest[:12]}) than when the "
                f"run began ({began[:12]}): start a new run, by another name=…, or name what it named then"
            )
        return found.prediction

    prediction = from_rank_0(read)
    return found, prediction
