"""How a step's command becomes processes, and how nothing of them is left."""
