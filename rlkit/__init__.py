"""rlkit: reinforcement-learning post-training for visual generation."""

__version__ = "0.1.0"
