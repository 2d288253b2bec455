"""ReMoE: mixture-of-experts with ReLU routing (arXiv 2412.14711), the algorithm on torch alone."""
