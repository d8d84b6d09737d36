"""Prompt sets: bundled, public, the user's; disguises."""
