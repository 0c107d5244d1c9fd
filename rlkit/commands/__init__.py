"""What the command line runs: one file each, with `arguments` and `run`. A folder may have a command of its own."""
