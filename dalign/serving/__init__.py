"""Asking a run's model: terminal, server."""
