"""Calibration prompts: where they come from, and their token ids."""
