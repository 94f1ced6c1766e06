"""From a source of images and a budget of time to a configuration, with a reason for every choice.

`look` examines the source, `measure` the machine; `propose` is a pure function of what they found; `make` does all of
it, and stores the plans, so that a repeated command resumes with its own. Nothing is imported here: budgets are parsed
before the environment of Ray is set, and `measure` imports Ray.
"""
