"""The networks of the codec.

Letters in shapes and equations:
    B        batch
    H, W     picture height and width, in pixels
    h, w     height and width of a latent grid, in positions
    C        channels of a feature map
    P        code planes of a slice, or of a level
    D        code length: dimensions of one code vector
    K        codebook size
    F        features of a code in the rate model: D + 2
    N        rows: positions of a batch of grids in raster order
    q        quality, 1..100;  t = (q - 1) / 99 maps it to [0, 1]

Levels are spelled `top` (coarse) and `bottom` (fine); with more than two, coarse comes first.
"""
