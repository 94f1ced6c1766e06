"""From a source of images and a budget of time to a configuration, with a reason for every choice.

`look` examines the source, `measure` the machine; `propose` is a pure function of what they found. `PlanBook` keeps the
plans of commands, so that a command that is repeated goes on with its own.
"""

from pipelines.plan.advice import more_time
from pipelines.plan.budget import parse_budget, spoken
from pipelines.plan.facts import Line, MachineFacts, Mirror, Plan, SourceFacts
from pipelines.plan.keep import PlanBook, StoredPlan, to_yaml
from pipelines.plan.look import look
from pipelines.plan.measure import measure
from pipelines.plan.networks import Candidate, candidates
from pipelines.plan.propose import propose

__all__ = [
    "Candidate",
    "Line",
    "MachineFacts",
    "Mirror",
    "Plan",
    "PlanBook",
    "SourceFacts",
    "StoredPlan",
    "candidates",
    "look",
    "measure",
    "more_time",
    "parse_budget",
    "propose",
    "spoken",
    "to_yaml",
]
