"""How speed is measured: kernels alone, whole models, and other engines side by side. See docs/benchmarks.md."""
