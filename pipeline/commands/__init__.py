"""Commands of `shotless`, a module each. Heavy libraries are imported inside the commands: `shotless check` must not wait for torch."""
