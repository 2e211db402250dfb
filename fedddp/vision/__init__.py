"""Vision models by name, and the tasks they are trained for."""
