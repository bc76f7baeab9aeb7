"""The embedded world: customer messages, support replies, gold rewards, and a tiny policy that writes replies."""
