"""Scores on disk: the log that a run writes, the cache of logs, the authors' files."""
