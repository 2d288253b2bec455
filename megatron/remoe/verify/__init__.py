"""Checks that users can run: whether this machine trains the same run under every layout."""
