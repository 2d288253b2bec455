"""The report of analyzed runs: one HTML file, which needs neither a network nor a server."""
