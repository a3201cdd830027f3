"""Selecting: from scores to the rows that train, and how stable that choice is."""

from ..choices import STRATEGIES
from .select import quota_to_count, select_rows

__all__ = ["STRATEGIES", "quota_to_count", "select_rows"]
