"""`python -m pallas_kernels.aot`."""

from pallas_kernels.aot.command import main

if __name__ == "__main__":
    main()
