"""Meshes over HTTP and in a browser: `prd serve` and `prd demo`, over one queue of jobs and one worker."""
