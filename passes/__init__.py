"""Compile time: capture, observe, decide, quantize and lower the MoE blocks of a model."""
