"""What the stages ask of a field: English policies, or the policy world."""
