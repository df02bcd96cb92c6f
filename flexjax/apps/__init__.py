"""What people do with a model: jobs over files, benchmarks' adapters."""
