"""Commands that serve other runs: a reward behind HTTP, and the vLLM servers of a recipe."""
