"""What is done to activations while a model runs: where (sites) and for how long (scope)."""
