"""The networks of tests that do not look at what is learnt."""

TINY_UNET = ["model.channels=[32]", "model.attention=[true]", "model.layers_per_block=1"]
"""Overrides by which a UNet is as small as it gets."""
