"""The recipes: YAML only. This file is here so that an editable install finds the folder as rlkit.recipes."""
