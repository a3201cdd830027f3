"""Analysing: how much every row of the down-projections contributes to general knowledge."""

from .attribute import attribute

__all__ = ["attribute"]
