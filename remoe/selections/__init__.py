"""Selections: from router logits to gates and routing map, one file each.

The selections of ReLU, TopK and Expert Choice are in `remoe.routing`. A selection is a pure
function; what moves its state once per step is one too.
"""
