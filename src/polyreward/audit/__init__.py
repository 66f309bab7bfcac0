"""Can these rewards be trusted, and what do they do to the update: diagnosis of rollout logs."""
