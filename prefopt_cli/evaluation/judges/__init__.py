"""Which of two replies is better: reward models, and models behind an OpenAI-compatible interface."""
