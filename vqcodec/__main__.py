"""`python -m vqcodec` is the same as `vqcodec`."""

from vqcodec.cli import main

if __name__ == "__main__":
    main()
