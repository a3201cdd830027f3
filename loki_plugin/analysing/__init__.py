"""Analysing: how much every row of the down-projections contributes to general knowledge."""

from .attribution.attribute import attribute

__all__ = ["attribute"]
