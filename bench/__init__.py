"""The benchmark: scripts and their modules, not part of the installed package."""
