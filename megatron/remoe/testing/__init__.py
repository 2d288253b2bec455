"""Runs of the golden files in Megatron, which `verify` and the tests share."""
