"""Evaluation of trained models: tasks of lm-evaluation-harness, and perplexity by domain."""
