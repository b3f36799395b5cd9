"""All that can be set: fields, presets, command line, what is chosen from images; and the parts built from it."""

from iic_dist.config.settings import HEADS, Config

__all__ = ["HEADS", "Config"]
