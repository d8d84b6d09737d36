"""Written specifications, and how they are put in front of a prompt."""
