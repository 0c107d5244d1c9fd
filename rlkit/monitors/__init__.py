"""Is the reward still worth what it says? What is watched, and by which signs."""
