"""Sampling, rewards, advantages and the exemplar pools of the RL stages."""
