"""What benchmarks/gpu_suite.py is made of: see there."""
