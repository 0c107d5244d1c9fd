"""A tiny visual world: captions, the scenes they describe, and a checker that reads a picture back."""
