"""What looks at a run without being a stage: plans, probes, sweeps."""
