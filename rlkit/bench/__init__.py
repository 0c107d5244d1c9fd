"""Benchmarks: commands that measure this machine. No test reads a clock."""
