"""Asking a run's model: terminal, server, task suites of others."""
