"""Measures the claims of the README against what people use instead."""
