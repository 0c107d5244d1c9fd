"""What an agent may call, how its turns are read, and what is learnt from its tries."""
