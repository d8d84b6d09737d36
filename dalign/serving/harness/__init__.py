"""A run's model in a task suite of others: lm-evaluation-harness."""
