"""The rollouts, one file each: where samples come from. The file name is the name in a recipe."""
