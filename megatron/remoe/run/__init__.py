"""What the parent process does: configs, checks before a start, launching, sweeps, descriptions."""
