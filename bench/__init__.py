"""Benchmarks and experiments of hawk_kernels; nothing here is imported by the package itself."""
