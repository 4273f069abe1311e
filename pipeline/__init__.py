"""The library of shotless: in-context learning distillation as an offline, cached pipeline. See `docs/` and CONTRIBUTING.md."""
