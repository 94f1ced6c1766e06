"""From a source of images and a budget of time to a configuration, with a reason for every choice.

`look` examines the source, `measure` the machine; `propose` is a pure function of what they found; `make` does all of
it, and keeps the plans of commands, so that a command that is repeated goes on with its own. Nothing is imported here:
what a budget means is asked before the environment of Ray is set, and `measure` imports Ray.
"""
