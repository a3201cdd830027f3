"""Protection, the input side: what general text reads, and an update that reads less of it."""

from .finding import input_directions

__all__ = ["input_directions"]
