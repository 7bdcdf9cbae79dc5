"""What other systems need of featcache: `metrics` for Prometheus, `tracing` for OpenTelemetry, `vllm`.

Nothing here is imported by `import featcache`; each module needs an extra of its own.
"""
