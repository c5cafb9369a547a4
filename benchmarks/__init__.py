"""The stages of mllm under pytest-benchmark: `pytest benchmarks --benchmark-json out.json`."""
