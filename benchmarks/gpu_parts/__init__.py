"""The phases of ``benchmarks/gpu_check.py``."""
