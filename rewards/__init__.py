"""The catalogue of rewards: one file per entry."""
