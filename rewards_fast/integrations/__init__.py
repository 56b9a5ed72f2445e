"""Thin bridges from the reward to RL frameworks; each is imported only by who uses that framework."""
