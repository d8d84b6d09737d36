"""A run's model in the task suites of others: inspect_ai, lm-evaluation-harness."""
