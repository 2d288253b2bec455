"""Adoption: a trained TopK mixture becomes one whose tokens choose how many experts they use."""
