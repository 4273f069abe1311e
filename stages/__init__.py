"""The DVC stages: each file is one thin command that reads params and calls one function of `pipeline`."""
