"""Pages and pictures about finished runs and trained networks."""
