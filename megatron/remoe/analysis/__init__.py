"""Reading run directories, and what can be seen in them. Needs the `analysis` extra to plot."""
