"""How well a memory learns: small tasks, models of one size, the same training for all."""
