"""Evaluating: how much a fine-tuned model forgot of what its base knew."""

from .change import TaskChange, mean_relative_drop
from .quick import Forgetting, compare, log_probabilities

__all__ = ["Forgetting", "TaskChange", "compare", "log_probabilities", "mean_relative_drop"]
