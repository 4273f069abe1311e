"""Before a run: what this machine can do, params for a task of one's own, what a run will cost."""
