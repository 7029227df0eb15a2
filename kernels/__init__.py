"""Numbers and operators: affine quantization, bit planes, packed expert linears."""
