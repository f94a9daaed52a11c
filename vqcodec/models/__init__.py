"""The networks of the codec.

One alphabet throughout:
    B        batch
    H, W     picture height and width, in pixels
    h, w     height and width of a latent grid, in positions
    C        channels of a feature map
    P        code planes of a slice
    D        code length: dimensions of one code vector
    K        codebook size
    q        quality, 1..100;  t = (q - 1) / 99 the same on [0, 1]

Levels are spelled `top` (coarse) and `bottom` (fine); with more than two, coarse comes first.
"""
