"""What fits and how fast, before a machine is asked for: `bpo plan`."""
