"""`python -m pallas_kernels.autotune`."""

from pallas_kernels.autotune.command import main

if __name__ == "__main__":
    main()
