"""Numpy reference of the model families and samplers: the yardstick of tests/golden."""
