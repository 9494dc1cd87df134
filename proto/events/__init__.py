"""Events: past-tense facts. Each docstring says who appends it, when, and what is then true."""
