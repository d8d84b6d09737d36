"""Decoding: batches that refill, and requests that come at any time."""
