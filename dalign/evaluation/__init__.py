"""Scores for evaluation, which share nothing with the judges of training."""
