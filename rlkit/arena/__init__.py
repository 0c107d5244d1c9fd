"""Algorithms side by side on one budget of training time, and the page that tells of it."""
