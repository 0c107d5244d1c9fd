"""The commands that made the weights which ship with rlkit, one file for each network."""
