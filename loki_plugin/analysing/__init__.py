"""Analysing: how much every row of the down-projections contributes to general knowledge."""

from .attribute import attribute
from .directions import input_directions

__all__ = ["attribute", "input_directions"]
