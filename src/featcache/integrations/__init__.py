"""What other systems need of featcache: `metrics` for Prometheus, `tracing`, `mooncake`, `vllm`, `sglang`.

Nothing here is imported by `import featcache`; each needs an extra of its own, or the system itself.
"""
