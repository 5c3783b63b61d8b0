"""The parts of ``benchmarks/speed.py``, one module each, and what they share."""
