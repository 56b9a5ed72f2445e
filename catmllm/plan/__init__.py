"""What a configuration needs on a number of ranks, before anybody runs it."""
