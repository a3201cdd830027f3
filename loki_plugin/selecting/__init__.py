"""Selecting: from scores to the rows that train, and how stable that choice is."""

from .select import STRATEGIES, quota_to_count, select_rows

__all__ = ["STRATEGIES", "quota_to_count", "select_rows"]
