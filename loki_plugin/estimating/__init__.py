"""What a run will take, from its configuration alone: memory, time, disk.

Arithmetic on sizes; no weights are loaded and nothing runs. The tests hold memory to dry runs and
sizes to real ones; times are predictions.
"""
