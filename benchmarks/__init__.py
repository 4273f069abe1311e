"""Speed and memory, side by side with what else there is. Each engine runs in a process that does nothing else."""
