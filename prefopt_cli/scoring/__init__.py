"""Log-probabilities of responses under a policy."""
