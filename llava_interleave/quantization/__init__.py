"""Quantization: a finished network's linears replaced by int8, int4, fp8 or NF4 ones. Knows no
files."""
