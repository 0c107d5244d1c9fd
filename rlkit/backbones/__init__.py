"""Backbones: one file each, a frozen dataclass that loads a network with its encode and decode."""
