"""Other people's training stacks. Each module names the extra that it needs when that is not installed."""
