"""Workers that write for the learner: what is asked of them, vLLM as one of them, and how weights get there."""
