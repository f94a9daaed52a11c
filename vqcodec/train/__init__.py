"""What learning needs and coding does not: `run.train` makes weights from pictures."""
