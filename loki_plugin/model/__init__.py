"""What a model is: its parts, its identity, and how its weights are stored."""
