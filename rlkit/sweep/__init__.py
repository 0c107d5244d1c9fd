"""Sweeps: W&B's sweep files, their trials on this machine, and the table of what came out."""
