"""Configs: what each stage is told, as frozen, checked dataclasses."""
