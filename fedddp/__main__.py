"""`python -m fedddp` is `fedddp`; so `torchrun -m fedddp run ...` works."""

from fedddp.cli import main

if __name__ == "__main__":
    main()
