"""What reading and writing pictures takes besides Pillow: colours, metadata, samples, and Pillow's own ways."""
