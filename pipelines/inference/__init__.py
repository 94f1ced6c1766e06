"""Pictures from a model for one typed request: what the command line, a server and an evaluation have in common.

`request` is what can be asked, in words that all ways to ask share; `inputs` reads given images and masks; `pictures`
resolves a request against a model and draws it; `files` writes what was drawn, and `likelihood` measures images.

Nothing is imported here: `pictures` imports torch, which `ddpm --help` does without.
"""
