"""Run the benchmark: ``torchrun --nproc-per-node N -m distckpt.bench --directory DIR``."""

from distckpt.bench.command import main

if __name__ == "__main__":
    main(prog_name="python -m distckpt.bench")
