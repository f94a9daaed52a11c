"""Before and after in a browser: `vqcodec compare --html` and `vqcodec studio`."""
