"""The catalogue of tools that an agent calls: one file per entry."""
