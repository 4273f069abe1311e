"""Stage one: plan, forward, write; every (prompt, model) once."""
