"""The parts of `benchmarks/peers.py`: models and data, tools, jobs, reference, report."""
