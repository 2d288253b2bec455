"""Runs of the golden files in Megatron, which `verify`, `bench` and the tests share."""
