"""The closed loop of design: search, exemplar pool, reward, constraints."""
