"""Suites of prompts, drawn and scored without any training, and the tables made of them."""
