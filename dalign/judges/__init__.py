"""Verdicts for training: rubric, models, servers, recorded votes."""
