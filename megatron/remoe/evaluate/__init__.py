"""How good a trained model is: tasks of lm-evaluation-harness, and perplexity by domain."""
