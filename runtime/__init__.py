"""Run time: the channel pool and what swaps its contents while the model serves."""
