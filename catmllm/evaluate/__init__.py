"""What is measured, against which baselines and judges, and the report of it."""
