"""Implanting: train the selected rows and nothing else."""

from .adapter import implant

__all__ = ["implant"]
