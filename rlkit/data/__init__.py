"""Prompts: where they come from, which of them a step draws, and the pictures that belong to them."""
