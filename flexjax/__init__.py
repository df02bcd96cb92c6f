"""High-throughput generation with models that do not fit the accelerator."""
